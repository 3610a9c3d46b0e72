"""A whole layer of the Hopper backend on paper: what it launches, with which operands; its Triton stages compiled."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_cases import largest_call

pytest.importorskip("triton")

from dsv4.backends import hopper, proof
from dsv4.backends.base import Call, InputScales, Packed
from dsv4.backends.hopper import FEW_TOKENS, MANY_TOKENS, TILINGS, HopperBackend, kernels
from dsv4.backends.proof import configurations
from dsv4.config import MoEConfig
from dsv4.kernels.cutedsl.cache import KernelCache
from dsv4.kernels.hopper import launch
from dsv4.kernels.hopper.config import FEW_SLOTS, HopperConfig
from dsv4.kernels.hopper.packing import pack
from dsv4.kernels.triton.stages import ScaleSource
from kernels.fake_driver import FakeDriver, installed
from kernels.fake_driver import Launch as GemmLaunch
from kernels.offline import Launch, compiled_as, recorded, sass

K = 2
MODES: dict[str, dict[str, Any]] = {
    "w4a16": {"activation_format": "bf16", "swiglu_limit": 10.0},
    "static": {},
    "token": {"activation_scale": "token"},
    "tensor": {"activation_scale": "tensor"},
    "per-expert": {"l1_scale_policy": "per_expert", "route_weight": "before_down"},
    "input": {"activation_format": "bf16", "route_weight": "input", "top_k": 1},
    "invariant": {"activation_format": "bf16", "batch_invariant": True},
}
SCALED_BY = {
    "w4a16": ScaleSource.NONE,
    "static": ScaleSource.GIVEN,
    "token": ScaleSource.ROW,
    "tensor": ScaleSource.BATCH,
    "per-expert": ScaleSource.EXPERT,
    "input": ScaleSource.NONE,
    "invariant": ScaleSource.NONE,
}


@pytest.fixture(autouse=True)
def a_gpu_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(KernelCache, "load", lambda self, config, arch: (repr(config).encode(), "entry"))


def on_paper(config: MoEConfig) -> tuple[HopperBackend, Packed, torch.Tensor, InputScales | None]:
    """A backend, packed weights, scratch, and input scales where the mode has some."""
    cpu, experts = torch.device("cpu"), config.num_experts
    backend = HopperBackend(config, cpu)
    fixed = config.quantizes_activations and config.activation_scale == "static"
    scales = InputScales.updated(None, torch.ones(experts), torch.ones(experts)) if fixed else None
    scratch = torch.zeros(HopperBackend.workspace_bytes(config, cpu), dtype=torch.uint8)
    return backend, Packed.empty(experts, backend._expert_bytes, cpu), scratch, scales


def launches(tokens: int, experts: int, h: int, i: int, **settings: Any) -> tuple[list[GemmLaunch], list[Launch]]:
    """What one call launches: GEMMs, and kernels of Triton."""
    top_k = settings.pop("top_k", K)
    config = MoEConfig(experts, h, i, max_num_tokens=max(tokens, 16), top_k=top_k, **settings)
    backend, packed, scratch, scales = on_paper(config)
    call = Call(
        torch.zeros(tokens, h, dtype=torch.bfloat16),
        torch.zeros(tokens, top_k),
        torch.zeros(tokens, top_k, dtype=torch.int64),
        input_scales=scales,
    )
    driver = FakeDriver(launch.GEMM_SIGNATURE)
    with recorded() as stages, installed(driver, launch.gemm_kernel):
        backend.run(packed, call, scratch, torch.zeros(tokens, h, dtype=torch.bfloat16))
    return driver.launches, stages


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("line", TILINGS, ids=lambda line: f"up-to-{line.rows_per_expert:g}")
def test_two_products_hand_over_an_image(line, mode):
    """Every line, every mode: operands fit (or the launcher refuses), GEMM 1 multiplies the tokens' image and GEMM 2
    what GEMM 1 wrote, each token has a scale of its own where activations are quantized, and the routing weight where
    it acts in GEMM 1. Around the products are the stages meant, in order."""
    top_k = MODES[mode].get("top_k", K)
    tokens, experts = largest_call(TILINGS, line, top_k)
    h, i = 256, 384
    (first, second), stages = launches(tokens, experts, h, i, **MODES[mode])
    for product in (first, second):
        assert f"loops={line.loops}," in product.cubin.decode()
        assert product.launch_attributes == [(6, 1)]  # it may begin before what it waits for has ended
    assert first.arguments[3:7] == second.arguments[3:7]  # one schedule, of which each counts its own tiles
    assert second.arguments[7] == first.arguments[7] + 4
    assert "gated=True" in first.cubin.decode()
    assert "gated=False" in second.cubin.decode()
    assert first.arguments[11] == second.arguments[1]
    assert (first.arguments[13], second.arguments[13]) == (h // 128, i // 128)
    quantized = MODES[mode].get("activation_format") != "bf16"
    known = mode in ("static", "per-expert")
    assert f"row_scale={quantized}" in first.cubin.decode()
    assert bool(first.arguments[8]) == quantized
    assert bool(second.arguments[8]) == (quantized and not known)
    # Scales that are known ahead: GEMM 1 quantizes its result, and GEMM 2 multiplies by the same numbers.
    assert f"requantized={known}" in first.cubin.decode()
    assert first.arguments[9] == 0
    assert second.arguments[9] == (first.arguments[16] if known else 0)
    assert bool(second.arguments[9]) == known
    assert f"weighted={mode == 'per-expert'}" in first.cubin.decode()
    assert first.arguments[15] == pytest.approx(MODES[mode].get("swiglu_limit", 0.0))
    assert second.arguments[0] - first.arguments[0] == 2 * i * h * 9 // 16
    names = [stage.kernel.fn.__name__ for stage in stages]
    of_batch, of_expert, few = mode == "tensor", mode == "per-expert", tokens <= FEW_TOKENS
    together = tokens * top_k <= FEW_SLOTS and not of_batch
    # Whoever reads the tables of routing without waiting must not be the launch behind the one that writes them.
    assert f"follows_routing={together}" in first.cubin.decode()
    assert "follows_routing=False" in second.cubin.decode()
    staged = not few and (mode == "input" or (quantized and not of_expert))
    placing = "_route_and_scatter" if together else "_scatter_rows" if few else "_gather_rows"
    assert names[names.index(placing if together else "_place") :] == [
        *([] if together else ["_place"]),
        *(["_batch_amax"] if of_batch else []),
        *(["_stage_rows"] if staged else []),
        placing,
        *(["_quantize_image"] if of_expert and not few else []),
        *(["_image_amax"] if of_batch else []),
        *(["_quantize_image"] if quantized and not known else []),
        "_combine",
    ]
    if quantized and not known:
        assert stages[-2].arguments["DEPENDENT"]
    assert stages[-1].arguments["DEPENDENT"]
    arguments = {name: stage.arguments for name, stage in zip(names, stages, strict=True)}
    assert arguments[placing]["image"].data_ptr() == first.arguments[1]
    if few:
        assert arguments[placing]["DEPENDENT"]
    if few or staged:
        quantizing = arguments[placing if few else "_stage_rows"]
        assert quantizing["SOURCE"] == SCALED_BY[mode]
        assert quantizing["HAS_WEIGHT"] == (mode == "input")
    if staged:
        assert arguments[placing]["x"].data_ptr() == arguments["_stage_rows"]["out"].data_ptr()
        assert arguments[placing]["HAS_SCALE"] == quantized


@pytest.mark.parametrize(
    ("tokens", "mode", "h", "i"),
    [
        (1, "w4a16", 4096, 2048),
        (16, "token", 4096, 2048),
        (FEW_SLOTS // K, "w4a16", 7168, 3072),
        (FEW_SLOTS // K, "token", 7168, 3072),
        (FEW_TOKENS, "per-expert", 4096, 2048),
        (FEW_TOKENS + 1, "token", 4096, 2048),
        *(
            pytest.param(tokens, mode, 7168, 3072, marks=pytest.mark.kernels)
            for tokens in (1, 16, FEW_SLOTS // K, FEW_TOKENS, FEW_TOKENS + 1)
            for mode in ("w4a16", "token", "tensor", "per-expert")
        ),
    ],
)
def test_stages_compile_for_hopper(tokens, mode, h, i, tmp_path):
    """The stages of this backend alone, on the models' sizes, compile and keep nothing in local memory."""
    _, found = launches(tokens, 8, h, i, **MODES[mode])
    stages = [stage for stage in found if stage.kernel.fn.__module__.startswith("dsv4.kernels.hopper.")]
    assert stages
    for stage in stages:
        instructions = set(sass(stage.compile(90).asm["cubin"], tmp_path))
        assert not {"LDL", "STL"} & instructions, stage.kernel.__name__


@pytest.mark.parametrize(("k", "each"), [(128, 1), (2048, 1), (3072, 1), (7168, 2)])
def test_a_scale_group_is_one_thread_s(k, each, tmp_path):
    """What quantizes a group is computed by one of the eight threads that hold it, as few groups a thread as there
    are: one reciprocal for each, beside that of the row's scale and two where a division is not an ordinary one."""
    found = launches(FEW_TOKENS + 1, 8, 256, k, **MODES["token"])[1]
    [stage] = [stage for stage in found if stage.kernel.__name__ == "_quantize_image"]
    code = sass(stage.compile(90).asm["cubin"], tmp_path)
    assert code.count("MUFU") == 3 + each


@pytest.mark.parametrize("multiprocessors", [132, 114, 78, 16])
@pytest.mark.parametrize("config", configurations(), ids=lambda c: f"{c.activation_format}-{c.activation_scale}")
def test_the_proof_reaches_every_shape(config, multiprocessors, monkeypatch):
    """The calls of the self-check launch programs of every shape that any call launches, in both products, on chips and
    parts of chips of any size; and each of their pipelines is filled more than once."""
    properties = SimpleNamespace(multi_processor_count=multiprocessors, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    backend = HopperBackend(config, torch.device("cpu"))
    asked, every = ({backend._line(tokens) for tokens in some} for some in (
        {*proof._TOKENS, *backend.budgets()}, range(1, config.max_num_tokens + 1)
    ))  # fmt: skip
    first = partial(hopper._gemm1_config, quantize=config.quantizes_activations)
    for product in (first, hopper._gemm2_config):
        shapes = {product(config, line) for line in every}
        assert {product(config, line) for line in asked} == shapes
        assert all(shape.blocks * shape.stages < proof._SIZE // 128 for shape in shapes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("experts", [2, 96])
def test_what_is_launched_is_compiled_ahead(experts, mode):
    """Every call of any number of tokens, and of calibration, launches kernels that :func:`kernels` names."""
    most = 300
    settings = {"top_k": K} | MODES[mode]
    config = MoEConfig(experts, 256, 384, max_num_tokens=most, **settings)
    known = {repr(kernel) for kernel in kernels(config)}
    backend, packed, scratch, scales = on_paper(config)
    for tokens in (*backend.budgets(), most):
        x, ids = torch.zeros(tokens, 256, dtype=torch.bfloat16), torch.zeros(tokens, config.top_k, dtype=torch.int64)
        call = Call(x, torch.zeros(tokens, config.top_k), ids, input_scales=scales)
        driver = FakeDriver(launch.GEMM_SIGNATURE)
        with recorded(), installed(driver, launch.gemm_kernel):
            backend.run(packed, call, scratch, x)
            if config.quantizes_activations:
                backend._activated_amax(packed, call, backend._plan.views(scratch))
        assert {found.cubin.decode() for found in driver.launches} <= known, tokens


def test_buffers_lie_in_the_scratch_of_the_call():
    """Whichever of two is given, again and in turn, and views of it are made once while it stays."""
    config = MoEConfig(8, 256, 384, max_num_tokens=16, top_k=K, activation_format="bf16")
    backend, packed, first, _ = on_paper(config)
    second = torch.zeros_like(first)
    x, ids = torch.zeros(16, 256, dtype=torch.bfloat16), torch.zeros(16, K, dtype=torch.int64)
    for scratch in (first, first, second, first):
        driver = FakeDriver(launch.GEMM_SIGNATURE)
        with recorded(), installed(driver, launch.gemm_kernel):
            backend.run(packed, Call(x, torch.zeros(16, K), ids), scratch, x)
        for launched in driver.launches:
            for place in launched.arguments[1], *launched.arguments[3:8]:  # the image, and tables of routing
                assert scratch.data_ptr() <= place < scratch.data_ptr() + scratch.numel()
    assert backend._views(first) is backend._views(first)


def test_few_tiles_run_at_once():
    """Of V4-Flash and V4-Pro: one token's products, and two of V4-Flash's, take the shape with the fewest programs that
    are still one for each tile; some more the smallest, both products, up to 8 tiles a program; then the table's. A
    GEMM 1 that quantizes its result takes none with one warpgroup."""
    for (e, h, i), tokens, want in (
        ((256, 4096, 2048), 1, ((1, 2, 5, 3), (1, 2, 5, 3))),
        ((256, 4096, 2048), 2, ((2, 2, 3, 3), (2, 2, 3, 3))),
        ((256, 4096, 2048), 3, ((1, 2, 5, 3), (1, 2, 5, 3))),
        ((256, 4096, 2048), 8, ((1, 2, 5, 3), (1, 2, 5, 3))),
        ((256, 4096, 2048), 9, (TILINGS[0].gemm1, TILINGS[0].gemm2)),
        ((384, 7168, 3072), 1, ((1, 2, 3, 5), (2, 2, 3, 3))),
        ((384, 7168, 3072), 4, ((1, 2, 5, 3), (1, 2, 5, 3))),
        ((384, 7168, 3072), 5, (TILINGS[0].gemm1, TILINGS[0].gemm2)),
    ):
        config = MoEConfig(e, h, i, top_k=6, activation_format="bf16")
        line = HopperBackend(config, torch.device("cpu"))._line(tokens)
        assert (line.gemm1, line.gemm2) == want
        static = HopperBackend(MoEConfig(e, h, i, top_k=6), torch.device("cpu"))._line(tokens)
        assert static.gemm1 == want[0] if want[0][0] % 2 == 0 else static.gemm1[0] % 2 == 0
        assert static.gemm2 == want[1]


def test_without_the_dsl_it_declines_unless_every_kernel_is_cached(monkeypatch):
    """Those of the layer and those of the self-check: one that is missing, whichever, is found before weights are
    packed. With the DSL nobody looks."""
    config, cuda = MoEConfig(8, 256, 128, activation_format="bf16", batch_invariant=True), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked: list[HopperConfig] = []
    monkeypatch.setattr(hopper, "dsl_version", lambda: "4.8.1")
    monkeypatch.setattr(KernelCache, "missing", lambda self, needed, arch: asked.extend(needed) or [])
    assert HopperBackend.explain(config, cuda).usable
    assert not asked
    monkeypatch.setattr(hopper, "dsl_version", lambda: None)
    assert HopperBackend.explain(config, cuda).usable
    assert {*kernels(config), *(kernel for check in configurations() for kernel in kernels(check))} == {*asked}
    for absent in (asked[0], asked[-1]):
        monkeypatch.setattr(
            KernelCache, "missing", lambda self, needed, arch, absent=absent: [k for k in needed if k == absent]
        )
        verdict = HopperBackend.explain(config, cuda)
        assert not verdict.usable
        assert f"1 of the {len(set(asked))} kernels" in verdict.reason


@pytest.mark.parametrize("gated", [False, True])
def test_the_pack_kernel_compiles_for_hopper(gated, tmp_path):
    """With nothing in local memory."""
    with recorded() as found:
        pack(
            torch.zeros(2, 128, 64, dtype=torch.uint8), torch.zeros(2, 128, 8, dtype=torch.uint8),
            torch.zeros(2, 9216, dtype=torch.uint8), 0, gated,
        )  # fmt: skip
    (launched,) = found
    assert not {"LDL", "STL"} & set(sass(launched.compile(90).asm["cubin"], tmp_path))


@pytest.mark.parametrize("mode", ["w4a16", "static", "token"])
@pytest.mark.parametrize(
    ("experts", "top_k", "size", "most"),
    [(96, 5, 128, 700), (4, 2, 128, 700), (64, 2, 2048, 40), (8, 2, 512, MANY_TOKENS + 50)],
)
def test_warming_up_covers_every_number_of_tokens(mode, experts, top_k, size, most):
    """The budgets that a layer warms up by default launch every variant of every kernel that any call launches; with
    the largest size here all of the shapes for few tiles; some of the numbers where they are many."""
    config = MoEConfig(experts, size, size, max_num_tokens=most, top_k=top_k, **MODES[mode])
    backend, packed, scratch, scales = on_paper(config)
    whole = [
        torch.zeros(most, n, dtype=d) for n, d in ((size, torch.bfloat16), (top_k, torch.float32), (top_k, torch.int32))
    ]

    def variants(tokens: int) -> set[tuple[object, ...]]:
        x, weights, ids = (t[:tokens] for t in whole)
        driver = FakeDriver(launch.GEMM_SIGNATURE)
        with recorded() as stages, installed(driver, launch.gemm_kernel):
            backend.run(packed, Call(x, weights, ids, input_scales=scales), scratch, x)
        return {compiled_as(found) for found in stages} | {(found.cubin,) for found in driver.launches}

    warm = set().union(*(variants(tokens) for tokens in {*backend.budgets(), most}))
    every = range(1, most + 1) if most < MANY_TOKENS else (*range(1, most, 41), MANY_TOKENS, MANY_TOKENS + 1, most)
    missing = {tokens: new for tokens in every if (new := variants(tokens) - warm)}
    assert not missing
