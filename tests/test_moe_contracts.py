"""What the layer promises besides its numbers: ownership, determinism, settings, clear errors."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from layer_cases import MODES, build, inputs, on, poisoned, weights_on
from oracle import random_weights

from dsv4 import BackendError, ConfigError, InputError, Nvfp4MoE, StateError, Workspace
from dsv4.backends import BACKENDS, choose
from dsv4.backends.base import Verdict
from dsv4.config import MoEConfig

E, H, INTER, K = 4, 256, 128, 2
SCALES: dict[str, Any] = {"l1_input_scale": 0.002, "l2_input_scale": 0.01}


def layer(target, *, seed: int = 1, **settings: Any) -> Nvfp4MoE:
    return build(target, random_weights(E, H, INTER, seed=seed), top_k=K, **SCALES, **settings)


def batch(target, tokens: int = 9, seed: int = 0):
    return on(target[1], *inputs(tokens, H, K, E, seed=seed))


# Results and scratch


def test_the_result_is_the_callers(target):
    """A result is not overwritten by a later run of the same or of another layer that shares the workspace."""
    first, second = layer(target), layer(target, seed=2)
    result = first.run(*batch(target))
    kept = result.clone()
    first.run(*batch(target, seed=5))
    second.run(*batch(target, seed=6))
    assert torch.equal(result, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out(target, dtype):
    """``out=`` is filled and returned, and equals the result that is allocated."""
    moe = layer(target)
    args = batch(target)
    out = poisoned(9, H, target[1], dtype)
    assert moe.run(*args, out=out) is out
    assert torch.equal(out, moe.run(*args, out_dtype=dtype))


def test_bf16_is_fp32_rounded_once(target):
    """The bf16 result is the fp32 result with one rounding."""
    moe = layer(target)
    args = batch(target)
    assert torch.equal(moe.run(*args), moe.run(*args, out_dtype=torch.float32).bfloat16())


def test_inputs_are_left_alone(target):
    """run changes none of its arguments."""
    args = batch(target)
    copies = [t.clone() for t in args]
    layer(target, route_weight="before_down").run(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


def test_views_are_accepted(target):
    """Inputs may be strided views, or begin at any element, and so may out."""
    moe = layer(target)
    x, w, ids = batch(target)
    wide = torch.randn(9, 2 * H, device=target[1]).bfloat16()
    wide[:, ::2] = x
    out = poisoned(18, H, target[1])[::2]
    want = moe.run(x, w, ids)
    moe.run(wide[:, ::2], w.t().contiguous().t(), ids.t().contiguous().t(), out=out)
    assert torch.equal(out, want)
    out = poisoned(10, H, target[1]).flatten()[1 : 1 + 9 * H].view(9, H)
    moe.run(*(torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape) for t in (x, w, ids)), out=out)
    assert torch.equal(out, want)


@pytest.mark.parametrize("mode", MODES)
def test_what_scratch_held_is_of_no_account(target, mode):
    """Scratch full of zeros, huge numbers (and indices) or NaN gives the same bits, padding rows among the others."""
    moe = layer(target, workspace=Workspace(target[1]), **MODES[mode])
    x, w, ids = batch(target, 37)
    valid = torch.tensor([29], dtype=torch.int32, device=target[1])
    ids[3] = -1
    want = moe.run(x, w, ids, num_valid_tokens=valid)
    for byte in (0x00, 0x7F, 0xFF):
        moe._scratch.fill_(byte)
        out = poisoned(37, H, target[1])
        moe.run(x, w, ids, out=out, num_valid_tokens=valid)
        assert torch.equal(out, want)


def test_layers_share_one_workspace_by_default(target):
    """Layers of one device share their scratch; a layer given its own uses that."""
    first, second, apart = layer(target), layer(target), layer(target, workspace=Workspace(target[1]))
    args = batch(target)
    for moe in (first, second, apart):
        moe.run(*args)
    assert first._scratch is not None
    assert second._scratch is not None
    assert apart._scratch is not None
    assert first._scratch.data_ptr() == second._scratch.data_ptr() != apart._scratch.data_ptr()


def test_growing_a_workspace_leaves_older_layers_their_scratch(target):
    """A larger layer enlarges the workspace; the smaller one keeps its memory, as its captured graphs would need."""
    workspace = Workspace(target[1])
    small = layer(target, workspace=workspace)
    want = small.run(*batch(target))
    before = small._scratch
    large = build(target, random_weights(E, 2 * H, INTER, seed=1), top_k=K, max_num_tokens=512, workspace=workspace,
                  activation_format="bf16")  # fmt: skip
    large.run(*on(target[1], *inputs(9, 2 * H, K, E)))
    assert workspace.nbytes >= large.workspace_nbytes > small.workspace_nbytes
    assert small._scratch is before
    assert torch.equal(small.run(*batch(target)), want)


def test_two_threads_on_one_workspace_are_refused():
    """A second thread that enters a workspace in use gets an error, not another layer's numbers."""
    workspace = Workspace("cpu")
    seen: list[BaseException] = []

    def enter() -> None:
        try:
            with workspace.exclusive():
                pass
        except StateError as error:
            seen.append(error)

    with workspace.exclusive():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(seen) == 1
    with workspace.exclusive():  # and it is free again
        pass


def test_a_layer_can_be_freed(target):
    """Neither the operator's registry nor the default workspace keeps a layer or its weights alive."""
    moe = layer(target)
    moe.run(*batch(target))
    gone = weakref.ref(moe)
    del moe
    gc.collect()
    assert gone() is None


# Determinism


@pytest.mark.parametrize("mode", MODES)
def test_same_inputs_same_bits(target, mode):
    """Two runs, and two layers with the same weights, give the same bits."""
    args = batch(target, 70)
    moe = layer(target, **MODES[mode])
    first = moe.run(*args, out_dtype=torch.float32)
    assert torch.equal(first, moe.run(*args, out_dtype=torch.float32))
    assert torch.equal(first, layer(target, **MODES[mode]).run(*args, out_dtype=torch.float32))


@pytest.mark.parametrize("mode", [m for m in MODES if m != "w4a4-tensor"])
def test_batch_invariance(target, mode):
    """With batch_invariant=True a token alone has the bits it has in any batch, in any position."""
    moe = layer(target, batch_invariant=True, **MODES[mode])
    x, w, ids = batch(target, 70)
    whole = moe.run(x, w, ids, out_dtype=torch.float32)
    for t in (0, 1, 33, 69):
        alone = moe.run(x[t : t + 1], w[t : t + 1], ids[t : t + 1], out_dtype=torch.float32)
        assert torch.equal(alone[0], whole[t])
    order = torch.arange(69, -1, -1, device=target[1])
    assert torch.equal(moe.run(x[order], w[order], ids[order], out_dtype=torch.float32), whole[order])


# Weights


def test_unpack_is_the_inverse_of_pack(target):
    """A backend's packing keeps every code and scale."""
    weights = random_weights(E, H, INTER, seed=1, split_gate_up=True)
    moe = build(target, weights, top_k=K, **SCALES)
    assert moe._packed is not None
    unpacked = moe._backend.unpack(moe._packed)
    for got, want in zip(
        (unpacked.l1_fp4, unpacked.l1_sf, unpacked.l1_gs, unpacked.l2_fp4, unpacked.l2_sf, unpacked.l2_gs),
        weights_on(weights, target[1]),
        strict=True,
    ):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_an_experts_bytes_are_its_own(target):
    """One expert's weights live in its own row of the packed bytes: changing it changes no other row."""
    first, second = random_weights(E, H, INTER, seed=1), random_weights(E, H, INTER, seed=2)
    for name in ("l1_fp4", "l1_sf", "l2_fp4", "l2_sf"):
        getattr(second, name)[[0, 1, 3]] = getattr(first, name)[[0, 1, 3]]
    a, b = (build(target, w, top_k=K, **SCALES)._packed for w in (first, second))
    assert a is not None
    assert b is not None
    assert a.experts.is_contiguous()
    changed = (a.experts != b.experts).any(dim=1)
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_one_expert_is_replaced_in_place(target, mode):
    """Another layer's row of packed bytes and its global scales make that expert this layer's, and nothing else."""
    first, second = random_weights(E, H, INTER, seed=1), random_weights(E, H, INTER, seed=2)
    moe, other = (build(target, w, top_k=K, **SCALES, **MODES[mode]) for w in (first, second))
    args = batch(target, 30)
    moe.run(*args)
    for name in ("experts", "l1_gs", "l2_gs"):
        getattr(moe._packed, name)[2].copy_(getattr(other._packed, name)[2])
    for name in vars(first):
        getattr(first, name)[2] = getattr(second, name)[2]
    assert torch.equal(moe.run(*args), build(target, first, top_k=K, **SCALES, **MODES[mode]).run(*args))


def test_preparing_again_packs_in_place(target):
    """New weights go to the same memory, so that a captured graph would use them, and the result follows them."""
    moe = layer(target, seed=1)
    args = batch(target)
    moe.run(*args)
    address = moe._packed.experts.data_ptr()  # type: ignore[union-attr]
    scale = moe._static_scales.l2.data_ptr()  # type: ignore[union-attr]
    moe.prepare_weights_from_stacked(*weights_on(random_weights(E, H, INTER, seed=2), target[1]), **SCALES)
    assert moe._packed.experts.data_ptr() == address  # type: ignore[union-attr]
    assert moe._static_scales.l2.data_ptr() == scale  # type: ignore[union-attr]
    assert torch.equal(moe.run(*args), layer(target, seed=2).run(*args))


def test_prepare_weights_direct(target):
    """The older list interface, input features first, gives the same layer."""
    weights = random_weights(E, H, INTER, seed=1)
    l1_fp4, l1_sf, l1_gs, l2_fp4, l2_sf, l2_gs = weights_on(weights, target[1])
    moe = Nvfp4MoE(E, H, INTER, 64, K, target[1], backend=target[0], activation_scale="token")
    moe.prepare_weights_direct(
        [w.t() for w in l1_fp4], [s.t() for s in l1_sf], list(l1_gs),
        [w.t() for w in l2_fp4], [s.t() for s in l2_sf], [g.item() for g in l2_gs],
    )  # fmt: skip
    args = batch(target)
    assert torch.equal(moe.run(*args), layer(target, activation_scale="token").run(*args))


def test_prepare_weights_from_dequantized(target):
    """Weights quantized here decode to within NVFP4's error of the originals: half a step of 1/6 of a block's amax."""
    generator = torch.Generator().manual_seed(0)
    l1 = [torch.randn(2 * INTER, H, generator=generator).bfloat16().to(target[1]) for _ in range(E)]
    l2 = [torch.randn(H, INTER, generator=generator).bfloat16().to(target[1]) for _ in range(E)]
    moe = Nvfp4MoE(E, H, INTER, 64, K, target[1], backend=target[0], activation_format="bf16")
    moe.prepare_weights_from_dequantized(l1, l2)
    x, w, ids = batch(target)
    want = torch.zeros(9, H, device=target[1])
    for t in range(9):
        for j in range(K):
            gate, up = (l1[ids[t, j]].float() @ x[t].float()).chunk(2)
            want[t] += w[t, j] * (l2[ids[t, j]].float() @ (torch.nn.functional.silu(gate) * up))
    # Quantization noise of about 10 % a factor, in three factors, averages to less than their sum.
    assert ((moe.run(x, w, ids).float() - want).norm() / want.norm()) < 0.25


# Activation scales


def test_calibration_is_a_running_maximum(target):
    """Scales are amax / 2688 of what each local expert saw, over all batches; unseen experts take the largest."""
    moe = layer(target, activation_scale="calibrated", experts_start_idx=1)
    x, w, ids = batch(target, 6)
    ids.copy_(torch.tensor([[1, 0], [2, 0], [2, 9], [1, 1], [3, -1], [0, 0]]))  # local expert 3 (id 4) sees nothing
    l1, _ = moe.compute_activation_global_scales(x, w, ids)
    amax = x.float().abs().amax(dim=1)
    seen = torch.stack([amax[[0, 3]].amax(), amax[[1, 2]].amax(), amax[4]])
    torch.testing.assert_close(l1, torch.cat([seen, seen.amax().reshape(1)]) / 2688)
    again, _ = moe.compute_activation_global_scales(x * 0.5, w, ids)
    assert torch.equal(again, l1)
    larger, _ = moe.compute_activation_global_scales(x * 2, w, ids)
    torch.testing.assert_close(larger, 2 * l1)


def test_calibrated_equals_static_with_the_same_scales(target):
    """A calibrated layer computes what a static one computes with the observed scales."""
    moe = layer(target, activation_scale="calibrated")
    args = batch(target, 30)
    l1, l2 = moe.compute_activation_global_scales(*args)
    static = build(target, random_weights(E, H, INTER, seed=1), top_k=K, l1_input_scale=l1, l2_input_scale=l2)
    assert torch.equal(moe.run(*args), static.run(*args))


def test_calibration_leaves_bad_rows_out(target):
    """A NaN or Inf row does not spoil the scales."""
    x, w, ids = batch(target, 8)
    moe = layer(target, activation_scale="calibrated")
    want = moe.compute_activation_global_scales(x[1:], w[1:], ids[1:])
    x[0, 3] = torch.inf
    other = layer(target, activation_scale="calibrated")
    for got, expected in zip(other.compute_activation_global_scales(x, w, ids), want, strict=True):
        assert got.isfinite().all()
        # Row 0's own experts may only have lost its rows; everything else is the same.
        untouched = [e for e in range(E) if e not in ids[0].tolist()]
        assert torch.equal(got[untouched], expected[untouched])


def test_calibration_on_no_tokens(target, monkeypatch):
    """A batch without tokens changes no scale, and no backend is asked about it."""
    moe = layer(target, activation_scale="calibrated")
    want = moe.compute_activation_global_scales(*batch(target))
    monkeypatch.setattr(moe._backend, "activation_amax", None)
    for got, expected in zip(moe.compute_activation_global_scales(*batch(target, 0)), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["static", "calibrated"])
def test_scales_that_nobody_gave_are_an_error(target, mode):
    """Static without input scales, calibrated without data: run says what is missing and what to do."""
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, activation_scale=mode)
    with pytest.raises(StateError, match="compute_activation_global_scales"):
        moe.run(*batch(target))


def test_a_calibration_serves_static_weights_without_scales(target):
    """Weights that came without input scales may be calibrated instead."""
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K)
    args = batch(target)
    moe.compute_activation_global_scales(*args)
    assert moe.run(*args).isfinite().all()


# Settings


def test_setters_take_full_effect_before_warmup(target):
    """A limit set later equals a limit given at construction."""
    args = batch(target)
    moe = layer(target)
    moe.run(*args)
    moe.set_swiglu_limit(0.5)
    assert torch.equal(moe.run(*args), layer(target, swiglu_limit=0.5).run(*args))
    moe.set_swiglu_limit(None)
    assert torch.equal(moe.run(*args), layer(target).run(*args))


def test_fusing_changes_no_number(target):
    """Apart or fused, SwiGLU gives the same result; a backend that can only fuse says so."""
    args = batch(target)
    moe = layer(target, swiglu_limit=0.5)
    want = moe.run(*args)
    apart = MoEConfig(E, H, INTER, top_k=K, fused_swiglu=False)
    if type(moe._backend).explain(apart, target[1]).usable:
        moe.set_fused_swiglu(False)
    else:
        with pytest.raises(BackendError, match=f"set_fused_swiglu: the {target[0]} backend"):
            moe.set_fused_swiglu(False)
    torch.testing.assert_close(moe.run(*args), want, rtol=2**-7, atol=0)


def test_a_setter_that_the_backend_cannot_follow_raises(target, monkeypatch):
    """A backend that declines the new configuration is not left with it: an error that gives its reason."""
    moe = layer(target)
    args = batch(target)
    want = moe.run(*args)
    monkeypatch.setattr(
        type(moe._backend), "explain", staticmethod(lambda config, device: Verdict(False, "only fused"))
    )
    with pytest.raises(BackendError, match="only fused"):
        moe.set_fused_swiglu(False)
    assert torch.equal(moe.run(*args), want)


def test_setters_after_warmup_raise(target):
    """Captured graphs would keep the old setting: a change is refused, setting the same value is not a change."""
    moe = layer(target, swiglu_limit=0.5)
    moe.warmup((1,))
    with pytest.raises(StateError, match="warmup"):
        moe.set_swiglu_limit(1.0)
    with pytest.raises(StateError, match="warmup"):
        moe.set_fused_swiglu(False)
    moe.set_swiglu_limit(0.5)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_limits(target, limit):
    """0.0 and negative limits are refused by the layer: None is off."""
    moe = layer(target)
    with pytest.raises(ConfigError, match="swiglu_limit"):
        moe.set_swiglu_limit(limit)


def test_warmup(target):
    """Warm-up needs weights and budgets within the layer's size."""
    moe = layer(target)
    moe.warmup()
    moe.warmup((1, 256))
    with pytest.raises(ConfigError, match="max_num_tokens"):
        moe.warmup((257,))
    with pytest.raises(StateError, match="no weights"):
        Nvfp4MoE(E, H, INTER, 64, K, target[1], backend=target[0]).warmup()


def test_warming_up_covers_every_form_of_a_call(target, monkeypatch):
    """Ids of either width, with and without padding rows, for each budget: a kernel compiled later would be a pause."""
    moe = layer(target)
    seen = []
    monkeypatch.setattr(moe._backend, "warmup", lambda packed, scratch, calls: seen.extend(calls))
    moe.warmup((1, 4))
    forms = {(len(c.hidden_states), c.topk_ids.dtype, c.num_valid_tokens is None) for c in seen}
    assert forms == {(t, d, none) for t in (1, 4) for d in (torch.int32, torch.int64) for none in (True, False)}
    assert {c.num_valid_tokens.dtype for c in seen if c.num_valid_tokens is not None} == {torch.int32}


# Choosing a backend


def test_choosing(monkeypatch):
    """backend= wins; DSV4_BACKEND replaces auto; an unknown name lists the known ones."""
    config, cpu = MoEConfig(E, H, INTER), torch.device("cpu")
    monkeypatch.delenv("DSV4_BACKEND", raising=False)
    assert choose("auto", config, cpu).name == "reference"
    monkeypatch.setenv("DSV4_BACKEND", "nonsense")
    with pytest.raises(BackendError, match=r"DSV4_BACKEND=nonsense.*reference"):
        choose("auto", config, cpu)
    assert choose("reference", config, cpu).name == "reference"
    with pytest.raises(BackendError, match="backend=nonsense"):
        choose("nonsense", config, cpu)


def test_every_backend_explains_itself(target):
    """Each backend gives a verdict with words, usable or not, and a refused one is refused with them."""
    config, nowhere = MoEConfig(E, H, INTER), torch.device("meta")
    for backend in BACKENDS:
        assert backend.explain(config, target[1]).reason
        verdict = backend.explain(config, nowhere)
        assert not verdict.usable
        with pytest.raises(BackendError) as error:
            choose(backend.name, config, nowhere)
        assert verdict.reason in str(error.value)
    with pytest.raises(BackendError, match="no backend"):
        choose("auto", config, nowhere)


# Errors


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"hidden_size": 40}, "hidden_size must be a multiple of 16"),
        ({"intermediate_size": 8}, "intermediate_size must be a multiple of 16"),
        ({"top_k": 0}, "top_k"),
        ({"max_num_tokens": -1}, "max_num_tokens"),
        ({"experts_start_idx": -4}, "experts_start_idx"),
        ({"activation_format": "fp8"}, "activation_format"),
        ({"activation_scale": "magic"}, "activation_scale"),
        ({"route_weight": "both"}, "route_weight"),
        ({"route_weight": "input"}, "top_k = 1"),
        ({"batch_invariant": True, "activation_scale": "tensor"}, "batch_invariant"),
        ({"swiglu_limit": 0.0}, "swiglu_limit"),
        ({"l1_scale_policy": "min"}, "l1_scale_policy"),
        ({"expert_map": torch.tensor([0, 0])}, "expert_map"),
        ({"expert_map": torch.tensor([7])}, "expert_map"),
        ({"expert_map": torch.tensor([0.5])}, "expert_map"),
        ({"workspace": Workspace("meta")}, "workspace"),
    ],
)
def test_bad_settings(settings, match):
    """A setting out of range is refused at construction, by name."""
    arguments = {"num_experts": E, "hidden_size": H, "intermediate_size": INTER, "top_k": K, "device": "cpu"} | settings
    with pytest.raises(ConfigError, match=match):
        Nvfp4MoE(**arguments)  # type: ignore[arg-type]


def corrupt(name: str, index: tuple[int, ...], byte: int | float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        t = tensors[name]
        (t if t.dtype == torch.float32 else t.view(torch.uint8))[index] = byte

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (corrupt("l1_sf_stacked", (2, 5, 1), 0x7F), r"l1_sf_stacked.*\[2, 5, 1\]"),
        (corrupt("l2_sf_stacked", (1, 3, 0), 0xFF), "l2_sf_stacked"),
        (corrupt("l2_sf_stacked", (1, 3, 0), 0x81), "l2_sf_stacked"),
        (corrupt("l1_gs", (3, 1), float("nan")), r"l1_gs.*nan.*\[3, 1\]"),
        (corrupt("l1_gs", (3, 1), 0.0), "l1_gs"),
        (corrupt("l2_gs", (0,), -1.0), "l2_gs.*-1"),
        (corrupt("l2_gs", (0,), float("inf")), "l2_gs"),
        (lambda t: t.update(l1_fp4_stacked=t["l1_fp4_stacked"][:, :, :-1]), "l1_fp4_stacked.*found"),
        (lambda t: t.update(l2_fp4_stacked=t["l2_fp4_stacked"].to(torch.int8)), "l2_fp4_stacked.*int8"),
        (lambda t: t.update(l1_sf_stacked=t["l1_sf_stacked"].float()), "l1_sf_stacked.*float32"),
        (lambda t: t.update(l1_gs=t["l1_gs"][:2]), "l1_gs"),
        (lambda t: t.update(l1_gs=None), "l1_gs.*NoneType"),
        (lambda t: t.update(l2_gs=t["l2_gs"].reshape(E, 1)), "l2_gs"),
        (lambda t: t.update(l1_input_scale=0.0), "l1_input_scale"),
        (lambda t: t.update(l2_input_scale=torch.tensor([1.0, 2.0])), "l2_input_scale"),
        (lambda t: t.update(l2_input_scale=float("nan")), "l2_input_scale"),
        (lambda t: t.update(l2_input_scale=None), "both or neither"),
    ],
)
def test_bad_weights(target, change, match):
    """Weights that must not be computed with are refused, by tensor and place, before anything is packed."""
    names = ("l1_fp4_stacked", "l1_sf_stacked", "l1_gs", "l2_fp4_stacked", "l2_sf_stacked", "l2_gs")
    weights = random_weights(E, H, INTER, seed=1, split_gate_up=True)
    tensors: dict[str, Any] = dict(zip(names, weights_on(weights, target[1]), strict=True)) | SCALES
    change(tensors)
    moe = Nvfp4MoE(E, H, INTER, 64, K, target[1], backend=target[0])
    with pytest.raises(InputError, match=match):
        moe.prepare_weights_from_stacked(**tensors)
    with pytest.raises(StateError, match="no weights"):
        moe.run(*batch(target))


def test_zero_block_scales_are_legal(target):
    """A zero block scale, of either sign, is a block of zeros."""
    weights = random_weights(E, H, INTER, seed=1)
    tensors = weights_on(weights, target[1])
    tensors[1].view(torch.uint8)[0] = 0
    tensors[1].view(torch.uint8)[1] = 0x80
    moe = Nvfp4MoE(E, H, INTER, 64, K, target[1], backend=target[0], activation_scale="token")
    moe.prepare_weights_from_stacked(*tensors)
    x, w, ids = batch(target)
    ids[:, 0], ids[:, 1] = 0, 1
    assert (moe.run(x, w, ids) == 0).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a.update(hidden_states=a["hidden_states"].float()), "hidden_states.*bfloat16.*float32"),
        (lambda a: a.update(hidden_states=a["hidden_states"][:, :-1]), "hidden_states"),
        (lambda a: a.update(hidden_states=a["hidden_states"][0]), "hidden_states"),
        (lambda a: a.update(topk_weights=a["topk_weights"].bfloat16()), "topk_weights"),
        (lambda a: a.update(hidden_states=None), "hidden_states: expected a tensor, found NoneType"),
        (lambda a: a.update(topk_ids=a["topk_ids"].tolist()), "topk_ids: expected a tensor, found list"),
        (lambda a: a.update(num_valid_tokens=5), "num_valid_tokens: expected a tensor, found int"),
        (lambda a: a.update(topk_weights=a["topk_weights"][:, :1], topk_ids=a["topk_ids"][:, :1]), "topk_weights"),
        (lambda a: a.update(topk_ids=a["topk_ids"].float()), "topk_ids"),
        (lambda a: a.update(topk_ids=a["topk_ids"][:-1]), "topk_ids"),
        (lambda a: a.update(out=torch.empty(3, H, dtype=torch.bfloat16)), "out"),
        (lambda a: a.update(out_dtype=torch.int32), "out_dtype"),
        (lambda a: a.update(num_valid_tokens=torch.tensor([1.0])), "num_valid_tokens"),
        (lambda a: a.update(hidden_states=a["hidden_states"].to("meta")), "hidden_states.*meta"),
    ],
)
def test_bad_inputs(target, change, match):
    """An argument of the wrong shape, dtype or device is refused by name, with what was found and expected."""
    x, w, ids = batch(target)
    arguments: dict[str, Any] = {"hidden_states": x, "topk_weights": w, "topk_ids": ids}
    change(arguments)
    with pytest.raises(InputError, match=match):
        layer(target).run(**arguments)


def test_too_many_tokens(target):
    """More tokens than the layer was built for are refused, not written past a buffer."""
    with pytest.raises(InputError, match="max_num_tokens = 256"):
        layer(target).run(*batch(target, 257))
    layer(target).run(*batch(target, 256))
