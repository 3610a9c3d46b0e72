"""Hostile checkpoints: 2,000 cases of the seeded corpus, arbitrary JSON and bytes, and the holes that were found.

``make fuzz`` runs 100,000 cases; ``fuzz`` says what is asked of each.
"""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.checkpoints import open_checkpoint
from dsv4.errors import CheckpointError

from . import fuzz, make
from .hostile import hostile
from .hostile_folder import INDEX, MAKERS, Directory, Link, Pipe, build, object_text, pack, unpack, write
from .hostile_formats import ORACLES
from .hostile_mutations import MUTATIONS

CASES, PARTS = 2000, 8


@pytest.mark.timeout(240, method="thread")  # a case has its own alarm, for which signals are used
@pytest.mark.parametrize("part", range(PARTS))
def test_corpus(tmp_path, part):
    """Each case is refused with a message that names file and tensor, or decodes to the oracle's values."""
    tally = fuzz.run(range(part, CASES, PARTS), tmp_path)
    assert not tally.failures, "\n".join(tally.failures.values())
    assert tally.total == CASES // PARTS
    assert tally.accepted.total() > CASES // PARTS // 20  # the oracle's values are compared in earnest


def test_corpus_repeats_and_uses_every_mutation():
    """A seed means one case, wherever and whenever it is made, and no mutation is there for nothing."""
    cases = [hostile(seed) for seed in range(600)]
    assert all(hostile(case.seed) == case for case in cases[::50])
    assert {step for case in cases for step in case.steps} == {mutation.__name__ for mutation in MUTATIONS}


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.name)
@pytest.mark.parametrize("seed", range(5))
def test_what_the_corpus_starts_from_is_accepted(tmp_path, maker, seed):
    """Without a mutation every maker's checkpoint is read, to the oracle's values."""
    accepted, wrong = fuzz.problem(build(maker, Random(seed)), tmp_path / "case", tmp_path, ORACLES[maker.name])
    assert accepted
    assert not wrong


# Arbitrary input.

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def _examine(folder, maker, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("case")
    accepted, wrong = fuzz.problem(folder, root / "case", root, ORACLES[maker.name])
    assert not wrong, f"{'accepted' if accepted else 'refused'}: {wrong}"


@given(data=st.data(), maker=st.sampled_from(MAKERS), seed=st.integers(0, 20))
@settings(max_examples=150)
def test_arbitrary_json_in_a_header(tmp_path_factory, data, maker, seed):
    """Any JSON as a tensor's entry, as one of its fields, or as the metadata."""
    folder = build(maker, Random(seed))
    file = data.draw(st.sampled_from([name for name in folder if name.endswith(".safetensors")]))
    pairs, body = unpack(folder[file])
    place = data.draw(st.integers(0, len(pairs) - 1))
    name, entry = pairs[place]
    value = data.draw(_JSON)
    field = data.draw(st.sampled_from([None, *entry]))
    pairs[place] = (name, value if field is None else {**entry, field: value})
    _examine(folder | {file: pack(pairs, body)}, maker, tmp_path_factory)


@given(data=st.data(), maker=st.sampled_from(MAKERS), seed=st.integers(0, 20))
@settings(max_examples=150)
def test_arbitrary_json_beside_the_shards(tmp_path_factory, data, maker, seed):
    """Any JSON as the configuration, the index, or a value in them."""
    folder = build(maker, Random(seed)) | {"config.json": json.dumps(maker.config).encode()}
    file = data.draw(st.sampled_from([name for name in ("config.json", INDEX) if name in folder]))
    value = data.draw(_JSON)
    key = data.draw(st.sampled_from([None, *json.loads(folder[file])]))
    if key is not None:
        value = json.loads(folder[file]) | {key: value}
    _examine(folder | {file: json.dumps(value).encode()}, maker, tmp_path_factory)


@given(
    edits=st.lists(st.tuples(st.integers(0, 2**20), st.binary(max_size=9)), min_size=1, max_size=4),
    maker=st.sampled_from(MAKERS),
    seed=st.integers(0, 20),
)
@settings(max_examples=150)
def test_arbitrary_bytes(tmp_path_factory, edits, maker, seed):
    """Any bytes in place of as many others, anywhere in any file."""
    folder = build(maker, Random(seed))
    for position, new in edits:
        name = list(folder)[position % len(folder)]
        old = folder[name]
        start = position % (len(old) + 1)
        folder[name] = old[:start] + new + old[start + len(new) :]
    _examine(folder, maker, tmp_path_factory)


# One test for each hole that was found.


def refused(path: Path, match: str) -> None:
    with fuzz.time_limit(), pytest.raises(CheckpointError, match=match):
        fuzz.read(path)


def folder_with(tmp_path: Path, **files) -> Path:
    """A valid checkpoint in one file, with other files in place of or beside its own; ``_`` stands for a dot."""
    tensors = make.layer_tensors(0)
    path = make.write(tmp_path / "model", tensors, {"n_routed_experts": make.EXPERTS})
    for name, content in files.items():
        file = path / name.replace("_", ".")
        file.unlink(missing_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, Link):
            os.symlink(content.target, file)
        elif isinstance(content, Pipe):
            os.mkfifo(file)
        else:
            file.mkdir()
    return path


def edited_header(path: Path, edit) -> None:
    """``edit`` changes the pairs of the header, and may return other data."""
    file = path / "model.safetensors"
    pairs, data = unpack(file.read_bytes())
    new = edit(pairs)
    file.write_bytes(pack(pairs, data if new is None else new))


NAME = "model.layers.0.ffn.experts.1.w1.weight"


def test_a_name_twice_in_a_header(tmp_path):
    """The same tensor declared twice, also by another spelling: the last would have been taken."""
    path = folder_with(tmp_path)
    edited_header(path, lambda pairs: pairs.insert(0, (NAME, {**dict(pairs)[NAME], "dtype": "I8"})))
    refused(path, rf"model\.safetensors: .*{NAME}.* occurs twice")
    raw = (path / "model.safetensors").read_bytes().replace(b'"model.', b'"\\u006dodel.', 1)
    length = int.from_bytes(raw[:8], "little") + 5
    (path / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw[8:])
    refused(path, "occurs twice")


@pytest.mark.parametrize("file", ["config.json", INDEX, "hf_quant_config.json"])
def test_a_name_twice_in_a_json_file(tmp_path, file):
    """Two answers to one question, in a configuration or an index."""
    path = folder_with(tmp_path)
    (path / file).write_text(object_text([("weight_map", {}), ("x", 1), ("x", 1)]))
    refused(path, rf"{file}: .*'x' occurs twice")


@pytest.mark.parametrize(
    "entry", [["U8", [32, 32], [0, 1024]], {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": 1}]
)
def test_entries_that_only_the_library_takes(tmp_path, entry):
    """A list in place of an object, or a field that the format does not have: the safetensors library takes both."""
    path = folder_with(tmp_path)
    edited_header(path, lambda pairs: pairs.append((NAME + "x", entry)))
    refused(path, rf"model\.safetensors: tensor '{NAME}x': expected a header entry")


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**64], [2**62, 0, 2**62], [0] * 65])
def test_shapes_that_no_tensor_can_have(tmp_path, shape):
    """With a 0 among them the other sizes need no bytes: such a tensor passed, and reading it was a TypeError."""
    path = folder_with(tmp_path)
    end = (path / "model.safetensors").stat().st_size
    end -= 8 + int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    edited_header(path, lambda pairs: pairs.append(("x", {"dtype": "F32", "shape": shape, "data_offsets": [end, end]})))
    refused(path, r"model\.safetensors: tensor 'x': (no tensor can have|expected a shape)")


def test_a_fused_tensor_of_a_trillion_experts(tmp_path):
    """A size that costs the file nothing, and that a list of experts was made of."""
    entry = {"dtype": "BF16", "shape": [10**12, 0, 4], "data_offsets": [0, 0]}
    path = tmp_path / "model"
    path.mkdir()
    (path / "model.safetensors").write_bytes(pack([("model.layers.0.mlp.experts.gate_up_proj", entry)], b""))
    refused(path, "layer 0: fused expert tensors .* 100000, found")


@pytest.mark.parametrize("stated", [10**12, 10**400])
def test_a_configuration_of_a_trillion_experts(tmp_path, stated):
    """The missing ones were listed before the first eight were shown."""
    refused(
        folder_with(tmp_path, config_json=json.dumps({"n_routed_experts": stated}).encode()), r"missing \[4, 5, 6, "
    )


def test_a_limit_beyond_floating_point(tmp_path):
    """An integer that no float can hold was an OverflowError."""
    config = json.dumps({"swiglu_limit": 10**400}).encode()
    refused(folder_with(tmp_path, config_json=config), "swiglu_limit must be a positive number")


def test_small_experts_beside_a_large_one(tmp_path):
    """A layer's tensors are allocated for experts of the first one's size: only once all are known to have it.

    256 experts, the first of 12 MB, would be 3 GB; the process may take 1 GB more than it has.
    """
    tensors = make.names(make.expert(0, hidden=4096, inter=2048), 0, 0)
    for expert in range(1, 256):
        tensors |= make.names(make.expert(expert, hidden=16, inter=16), 0, expert)
    path = make.write(tmp_path / "model", tensors)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, hard))
    try:
        refused(path, r"layer 0, expert 1: found hidden 16")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("kind", [Pipe(), Directory(), Link("model.safetensors"), Link("absent"), Link("/dev/zero")])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", INDEX])
def test_what_is_no_regular_file(tmp_path, file, kind):
    """A pipe made the reader wait for ever, a link in a circle was a RuntimeError, a broken one was passed over."""
    path = folder_with(tmp_path)
    (path / file).unlink(missing_ok=True)
    if kind == Link("model.safetensors"):
        kind = Link(file)
    write({file: kind}, tmp_path / "other", tmp_path)
    (tmp_path / "other" / file).rename(path / file)
    refused(path, re.escape(file))


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_files_behind_links_out_of_the_folder(tmp_path, file):
    """A download must not make us read, or show, files that are not its own."""
    path = folder_with(tmp_path)
    (tmp_path / "secret.json").write_text('{"weight_map": {}}')
    (path / file).unlink(missing_ok=True)
    os.symlink("../secret.json", path / file)
    refused(path, "outside the checkpoint")


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "x", "\x1b[2Jx", "\ud800x", "x\ny"])
def test_names_in_an_index_that_no_file_has(tmp_path, name):
    """Too long for the system (an OSError), beyond UTF-8, or with what a terminal would obey."""
    path = make.write_sharded(tmp_path / "model", make.layer_tensors(0))
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][NAME] = f"{name}.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: shard") as error:
        open_checkpoint(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "text", ["[" * 900 + "]" * 900, '{"weight_map":' + "[" * 900 + "]" * 900 + "}", '{"a":' * 70 + "1" + "}" * 70]
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_deep_json(tmp_path, file, text):
    """Less deep than what the parser refuses: printing the value recursed as well."""
    path = folder_with(tmp_path)
    (path / file).write_text(text)
    refused(path, rf"{file}: .*nested deeper than 64")


@pytest.mark.parametrize("scale", [1.3e35, 3e38])
def test_global_scales_that_decode_to_inf(tmp_path, scale):
    """Positive and finite, but 6 * 448 times it is not."""
    tensors = make.layer_tensors(0)
    tensors[NAME + "_scale_2"].fill_(scale)
    refused(make.write(tmp_path / "model", tensors), r"model\.safetensors: layer 0, expert 1, gate: .* decode to Inf")


# Sizes.


@pytest.mark.parametrize("length", [0, 10**8 - 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_declared_header_lengths(tmp_path, length):
    """A length is believed only as far as the file goes, and never beyond the format's 100 MB."""
    path = folder_with(tmp_path, model_safetensors=struct.pack("<Q", length) + b"{}")
    refused(path, r"model\.safetensors: not a readable safetensors file")


def test_a_sparse_file_of_a_terabyte(tmp_path):
    """Size on paper costs nothing: neither a header nor a JSON file is read because it is there."""
    path = folder_with(tmp_path)
    for file, length in (("model.safetensors", 10**8), ("config.json", 0)):
        with (path / file).open("r+b") as stream:
            stream.write(struct.pack("<Q", length) if length else b"")
            stream.truncate(2**40)
    refused(path, r"config\.json: 1099511627776 bytes of JSON")
    (path / "config.json").unlink()
    refused(path, r"model\.safetensors: ")


_PEAK = """
import resource, sys, torch, safetensors
from dsv4.checkpoints import open_checkpoint
from dsv4.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, error)
"""


def test_large_headers_of_small_values(tmp_path):
    """48 MB of which a JSON parser, the safetensors library's too, makes gigabytes: little more than the text here."""
    size, paths = 48_000_000, []
    for number, filler in enumerate((b"[],", b"1.5,", b'{"":1},', b"[" * 64 + b"]" * 64 + b",", b'"x":"",')):
        # The last is for a map of strings; the others for a list.
        start, end = (b'{"__metadata__":{', b'"y":""}}') if filler.startswith(b'"') else (b'{"a":[', b"1]}")
        header = start + filler * (size // len(filler)) + end
        path = tmp_path / str(number)
        path.mkdir()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *paths], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for line, path in zip(lines, paths, strict=True):
        peak, message = line.split(maxsplit=1)
        assert message.startswith(f"{path}/model.safetensors: ")
        assert len(message) < 1000
        assert int(peak) < 2.5 * size
