"""Hugging Face ids: found in the cache, asked for otherwise, and a sentence when they cannot be had."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dsv4.checkpoints import hub, open_checkpoint
from dsv4.errors import CheckpointError, ConfigError

from . import make

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def fill(cache, tensors: dict[str, torch.Tensor], revision: str = "main") -> None:
    """Put a repository ``owner/name`` into the cache as the library lays it out: links into ``blobs``."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    plain = make.write(cache / "plain", tensors, {"num_experts": make.EXPERTS})
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    listing = []
    for number, file in enumerate(sorted(plain.iterdir())):
        blob = f"{number:040x}"
        shutil.copyfile(file, repository / "blobs" / blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
        listing.append(file.name)
    (repository / "refs" / revision).write_text(COMMIT)
    shutil.rmtree(plain)
    assert json.loads((snapshot / "config.json").read_text())["num_experts"] == make.EXPERTS


def test_cached_id_is_opened(cache):
    """An id in the cache opens without a network, through the links of the cache, and loads the file's values."""
    tensors = make.layer_tensors(0)
    fill(cache, tensors)
    with open_checkpoint("owner/name") as opened:
        assert opened.folder.name == COMMIT
        assert opened.num_experts == make.EXPERTS
        layer = opened.load_layer(0)
    assert torch.equal(layer.l2_fp4[1], tensors["model.layers.0.ffn.experts.1.w2.weight"])


def test_cached_revision_is_opened(cache):
    """A branch other than the default one is found under its name, and only there."""
    fill(cache, make.layer_tensors(0), revision="nvfp4")
    with open_checkpoint("owner/name", revision="nvfp4") as opened:
        assert opened.folder.name == COMMIT
    with pytest.raises(CheckpointError, match="owner/name"):
        open_checkpoint("owner/name")


def test_id_that_cannot_be_had_is_a_sentence(cache):
    """Neither a path, nor in the cache, nor on a network: one line that says all three and what to do."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint("owner/name")
    for part in ("owner/name: no such file or folder here", "Hugging Face id", "hf download owner/name"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_asked_for(cache, monkeypatch, tmp_path):
    """Weights, configuration and tokenizer are downloaded, other copies of the weights are not."""
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(make.write(tmp_path / "fetched", make.layer_tensors(0)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with open_checkpoint("owner/name", revision="main") as opened:
        assert opened.folder == tmp_path / "fetched"
    assert (asked["repo_id"], asked["revision"]) == ("owner/name", "main")
    files = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
    others = ["pytorch_model.bin", "model.gguf", "original/consolidated.pth", "README.md", "inference/model.py"]
    kept = huggingface_hub.utils.filter_repo_objects([*files, *others], allow_patterns=asked["allow_patterns"])
    assert list(kept) == files


@pytest.mark.parametrize(
    "path", ["nowhere", "./owner/name", "/owner/name", "owner/name/x", "owner/..", "-a/b", "a--b/c"]
)
def test_paths_are_not_ids(cache, path):
    """What cannot be an id is a path that is missing, and nothing is looked up."""
    assert not hub.is_hub_id(path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(path)


def test_mistyped_local_paths_are_not_ids(cache, tmp_path):
    """A missing entry of a folder that is here is a path; so is whatever exists, named like an id or not."""
    make.write(tmp_path / "owner" / "name", make.layer_tensors(0))
    assert hub.resolve("owner/name") == hub.Path("owner/name")
    assert not hub.is_hub_id("owner/nam")
    with pytest.raises(ConfigError, match="needs a Hugging Face id"):
        open_checkpoint("owner/name", revision="main")
