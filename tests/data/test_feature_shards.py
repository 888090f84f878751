import pytest
import torch

from iomm.data.feature_shards import DamagedRow, Part, TornPart, layout_of, row_bytes, write_part

KEYS = ["0123456789abcdef" * 2, "f" * 32, "00" * 16]


def rows(names=("mean", "logvar"), dtype=torch.float32):
    torch.manual_seed(0)
    return {
        key: {name: torch.randn(tokens, 3).to(dtype) for name in names}
        for key, tokens in zip(KEYS, (4, 1, 6), strict=True)
    }


def test_rows_of_different_length_come_back_bit_for_bit_and_only_the_outputs_asked_for(tmp_path):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        written = rows(dtype=dtype)
        write_part(tmp_path / "p", written)
        part, keys_N = Part.open(tmp_path / "p")
        assert [key.tobytes().hex() for key in keys_N] == KEYS == [part.key(n) for n in range(3)]
        for n, key in enumerate(KEYS):
            found = part.read(n, ("logvar",))
            assert list(found) == ["logvar"]
            assert torch.equal(found["logvar"], written[key]["logvar"])
            assert found["logvar"].dtype == dtype


def test_a_part_is_a_safetensors_file(tmp_path):
    from safetensors import safe_open

    for names in (("patches",), ("mean", "logvar")):
        written = rows(names)
        write_part(tmp_path / "p", written)
        with safe_open(tmp_path / "p", framework="pt") as file:
            assert sorted(file.keys()) == sorted([*names, "records"])
            for name in names:
                tokens = torch.cat([row[name] for row in written.values()])
                assert torch.equal(file.get_tensor(name), tokens)


def test_the_disk_that_rows_take_is_known_beforehand(tmp_path):
    for names in (("patches",), ("mean", "logvar")):
        written = rows(names)
        write_part(tmp_path / "p", written)
        size = (tmp_path / "p").stat().st_size
        header = 8 + int.from_bytes((tmp_path / "p").read_bytes()[:8], "little")
        layout = layout_of(written[KEYS[0]])
        assert size - header == sum(row_bytes(layout, len(row[names[0]])) for row in written.values())


def test_a_flipped_bit_anywhere_before_the_outputs_makes_the_part_torn(tmp_path):
    write_part(tmp_path / "p", rows())
    good = (tmp_path / "p").read_bytes()
    outputs_begin = 8 + int.from_bytes(good[:8], "little") + 3 * 40
    for at in range(outputs_begin):
        data = bytearray(good)
        data[at] ^= 1
        (tmp_path / "p").write_bytes(data)
        with pytest.raises(TornPart):
            Part.open(tmp_path / "p")


def test_a_flipped_byte_in_an_output_costs_that_row_and_no_other(tmp_path):
    written = rows(("patches",))
    write_part(tmp_path / "p", written)
    data = bytearray((tmp_path / "p").read_bytes())
    data[-1] ^= 1  # of the last row
    (tmp_path / "p").write_bytes(data)
    part, _ = Part.open(tmp_path / "p")
    assert torch.equal(part.read(1, ("patches",))["patches"], written[KEYS[1]]["patches"])
    with pytest.raises(DamagedRow, match="row 2 of .*patches does not match its checksum"):
        part.read(2, ("patches",))


def test_a_part_cut_short_while_it_is_open_is_a_damaged_row(tmp_path):
    write_part(tmp_path / "p", rows())
    part, _ = Part.open(tmp_path / "p")
    with (tmp_path / "p").open("r+b") as file:
        file.truncate(450)
    with pytest.raises(DamagedRow, match="ends before byte"):
        part.read(2, ("mean",))


def test_what_is_no_part_is_torn(tmp_path):
    for n, data in enumerate(
        (b"", b"tar", bytes(8), b"\xff" * 500, (9).to_bytes(8, "little") + b'{"a": [1]}')
    ):
        (tmp_path / str(n)).write_bytes(data)
        with pytest.raises(TornPart):
            Part.open(tmp_path / str(n))
    with pytest.raises(TornPart, match="no such file"):
        Part.open(tmp_path / "absent")


@pytest.mark.parametrize(
    "row",
    [
        {"a": torch.zeros(3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int64)},
    ],
)
def test_outputs_that_are_not_tokens_of_numbers_are_an_error(row):
    with pytest.raises(ValueError, match="every output of a row must be"):
        layout_of(row)
