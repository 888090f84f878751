import dataclasses
import logging

import pytest
import torch
from PIL import Image

from iomm.config import DataConfig
from iomm.data import decoder
from iomm.data.decode_cpu import CpuDecoder, jpeg_way
from iomm.data.decoder import open_decoder
from iomm.data.errors import BadSample
from iomm.data.view import View
from tests.data.conftest import encode, loader, noise_image, scene

DATA = DataConfig(images=("*.tar",))


def test_auto_decodes_on_the_cpu_where_there_is_no_gpu_and_says_why(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert isinstance(open_decoder(DATA), CpuDecoder)
    assert f"decoding on the CPU: there is no GPU; {jpeg_way()}" in caplog.text


def test_auto_says_what_to_install_where_there_is_a_gpu_but_no_dali(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decoder, "dali_installed", lambda: False)
    with caplog.at_level(logging.INFO):
        assert isinstance(open_decoder(DATA), CpuDecoder)
    assert "DALI is not installed (pip install 'iomm[data]')" in caplog.text


def test_dali_that_was_asked_for_and_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(decoder, "dali_installed", lambda: False)
    with pytest.raises(ValueError, match=r"data\.decode=dali, but NVIDIA DALI is not installed"):
        open_decoder(dataclasses.replace(DATA, decode="dali"))


def test_the_loader_uses_the_chosen_decoder_and_held_out_images_the_reference(write_shard):
    jpeg = encode(scene(0, 40, 24), "JPEG", quality=90)
    shard = write_shard("jpeg.tar", [("a.jpg", jpeg), ("a.txt", b"a scene")])
    opened = loader(shard, heldout=(shard,), mix_ratio=1.0)
    fast_CHW, reference_CHW = opened.sample(0).image_CHW, opened.heldout(1).image_BCHW[0]
    [expected_CHW] = CpuDecoder().decode([jpeg], [View(8, 8)])
    assert isinstance(expected_CHW, torch.Tensor)
    assert torch.equal(fast_CHW, expected_CHW)
    assert not torch.equal(fast_CHW, reference_CHW)


class Together:
    """A decoder of whole batches that notes how many files each call has, and refuses files of one size."""

    whole_batches = True
    rescued = 0

    def __init__(self, bad_bytes: int = -1) -> None:
        self.calls: list[int] = []
        self._bad_bytes = bad_bytes

    def decode(self, files, views, into=None):
        self.calls.append(len(files))
        decoded = CpuDecoder().decode(files, views)
        bad = [len(data) == self._bad_bytes for data in files]
        return [BadSample("refused") if b else image for b, image in zip(bad, decoded, strict=True)]


def test_a_decoder_of_whole_batches_gets_each_batch_in_one_call(shard, monkeypatch):
    together = Together()
    alone = [batch.image_BCHW for batch in loader(shard).stream([[0, 1, 2], [3, 4]])]
    monkeypatch.setattr("iomm.data.loader.open_decoder", lambda data: together)
    batches = [batch.image_BCHW for batch in loader(shard).stream([[0, 1, 2], [3, 4]])]
    assert sorted(together.calls) == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(alone, batches, strict=True))


def test_the_loader_counts_the_calls_that_were_rescued(shard, monkeypatch):
    together = Together()
    monkeypatch.setattr("iomm.data.loader.open_decoder", lambda data: together)
    opened = loader(shard)
    together.rescued = 2
    assert opened.rescued == 2


def test_a_bad_image_of_a_whole_batch_is_replaced_by_the_next_of_its_epoch(write_shard, monkeypatch):
    files = [encode(noise_image(seed, 8 + seed)) for seed in range(6)]
    shard = write_shard("six.tar", [(f"{n}.png", data) for n, data in enumerate(files)])
    reports = []
    monkeypatch.setattr("iomm.data.loader.open_decoder", lambda data: Together(len(files[2])))
    opened = loader(shard, mix_ratio=1.0, on_bad=reports.append)
    keys = [sample.key for sample in opened.samples(range(6))]
    [report] = reports
    assert (report.key, report.reason) == ("2", "refused")
    assert "2" not in keys
    assert keys == [opened.sample(index).key for index in range(6)]


def test_a_file_larger_than_the_limit_is_a_bad_sample_and_not_read(write_shard):
    small, large = encode(noise_image(0, 8)), encode(noise_image(1, 64))
    shard = write_shard("sizes.tar", [("small.png", small), ("large.png", large)])
    reports = []
    opened = loader(shard, mix_ratio=1.0, on_bad=reports.append, max_image_bytes=len(large) - 1)
    assert {opened.sample(index).key for index in range(2)} == {"small"}
    [report] = reports
    assert report.reason == f"a file of {len(large)} bytes, more than the limit of {len(large) - 1} bytes"


def test_images_decoded_into_a_batchs_memory_are_those_decoded_alone(write_shard):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encode(scene(seed, 40, 24), "JPEG", quality=90) for seed in range(4)]
    files += [encode(scene(4, 24, 40), "JPEG", exif=exif), encode(noise_image(5)), files[0][:300]]
    shard = write_shard("mixed.tar", [(f"{n}.jpg", data) for n, data in enumerate(files)])
    alone, streamed = (loader(shard, mix_ratio=1.0, on_bad=lambda report: None) for _ in range(2))
    for _ in range(3):  # the later rounds in the memory of the first
        for batch, group in zip(
            streamed.stream([range(5), range(5, 9)]), (range(5), range(5, 9)), strict=True
        ):
            expected_BCHW = torch.stack([alone.sample(index).image_CHW for index in group])
            assert torch.equal(batch.image_BCHW, expected_BCHW)
