import io
import json
import shutil
import subprocess
import tarfile

import pytest
from PIL import Image

from iomm.bench import data
from iomm.bench.data import bench_data, write_shard


def has_libjpeg_header() -> bool:
    if shutil.which("cc") is None:
        return False
    source = b"#include <stdio.h>\n#include <jpeglib.h>\n"
    return not subprocess.run(["cc", "-E", "-"], input=source, capture_output=True).returncode


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its shard open
def test_the_loader_and_the_others_are_measured_in_turns_and_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(data, "SIZES_PX", ((64, 48), (150, 100)))
    monkeypatch.setattr(data, "dali_installed", lambda: False)
    *lines, last = bench_data(4, 4, 32, 2).splitlines()
    assert "ours with DALI" in lines[3]
    assert "not measured: needs DALI" in lines[3]
    record = json.loads(last)
    for size in ("64x48", "150x100"):
        rates = record["images_per_cpu_second"][size]
        assert len(rates["ours"]) == 2
        assert min(rates["ours"]) > 0
        assert ("floor (C)" in rates) == has_libjpeg_header()
        assert set(record["ours_over"][size]) == set(rates) - {"ours"}


def test_the_corpus_is_a_shard_of_distinct_jpegs_of_the_size_asked_for(tmp_path):
    path = write_shard(tmp_path / "corpus.tar", 5, 80, 60)
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar]
        images = [file.read() for file in files if file is not None]
    assert len(set(images)) == 5
    assert {Image.open(io.BytesIO(image)).size for image in images} == {(80, 60)}


def test_rounds_without_an_image_are_refused():
    with pytest.raises(ValueError, match="1000 and 3 images in 5 rounds"):
        bench_data(1000, 3, 512, 5)
