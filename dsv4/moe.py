"""Nvfp4MoE: the routed-expert block as one layer.

Global expert ids -> local ids -> rows ordered by expert -> (quantize) -> GEMM 1 (gate and up) -> clamped SwiGLU ->
(quantize) -> GEMM 2 (down) -> weighted combine. This file checks arguments, owns the state and calls; the arithmetic is
in :mod:`dsv4.ops` and in the backends.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv4.backends import Call, InputScales, Packed, Verdict, choose, explain_all
from dsv4.backends.base import OUT_DTYPES
from dsv4.checks import check_tensor, dtype_names, stack_experts
from dsv4.config import ActivationFormat, ActivationScale, L1ScalePolicy, MoEConfig, RouteWeight
from dsv4.errors import BackendError, ConfigError, InputError, StateError
from dsv4.nvfp4 import Nvfp4Tensor, global_scale
from dsv4.ops.custom_ops import nvfp4_moe_gemm, register_runner
from dsv4.ops.routing import checked_expert_map
from dsv4.weights import MoEWeights, per_expert_scales
from dsv4.workspace import Workspace, default_workspace, on_device

_log = logging.getLogger("dsv4")


class Nvfp4MoE:
    """The routed experts of one MoE layer, with NVFP4 weights.

    ::

        moe = Nvfp4MoE(256, 4096, 2048, top_k=6, device="cpu", swiglu_limit=10.0, activation_scale="token")
        moe.prepare_weights_from_stacked(l1_fp4, l1_sf, l1_gs, l2_fp4, l2_sf, l2_gs)
        moe.warmup()
        out = moe.run(hidden_states, topk_weights, topk_ids)

    Args:
        num_experts: experts on this rank (local), E.
        hidden_size: H, a multiple of 16.
        intermediate_size: I of one expert, a multiple of 16.
        max_num_tokens: the most tokens of one call; scratch is sized for it.
        top_k: routed experts a token.
        device: where weights and inputs live.
        experts_start_idx: global id of local expert 0. Ids outside ``[start, start + E)`` contribute nothing.
        backend: ``"auto"`` or a backend's name; the environment variable ``DSV4_BACKEND`` overrides ``"auto"``.
        activation_format: ``"nvfp4"`` (W4A4) or ``"bf16"`` (W4A16).
        activation_scale: where W4A4 takes activation scales from: ``"static"`` (the checkpoint's input scales),
            ``"token"`` (each token's amax), ``"tensor"`` (the amax of the valid, local slots) or ``"calibrated"``
            (the running maximum of :meth:`compute_activation_global_scales`).
        swiglu_limit: L of the clamped SwiGLU, None for no clamp.
        route_weight: apply the routing weight to the ``"output"``, ``"before_down"`` or to the ``"input"`` (top_k 1).
        batch_invariant: a token's bits do not depend on its batch.
        expert_map: integer ``[global]`` -> local id or -1, instead of the contiguous range.
        workspace: scratch memory; by default all layers of a device share one.
        l1_scale_policy: static scales of GEMM 1 that differ by expert are merged by ``"max"``, or kept
            (``"per_expert"``), at the price of quantizing a token once for each of its experts.

    Raises:
        ConfigError: a value or a combination that is not allowed.
        BackendError: no backend, or not the one asked for, can run this.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        max_num_tokens: int = 8192,
        top_k: int = 8,
        device: torch.device | str = "cuda",
        experts_start_idx: int = 0,
        *,
        backend: str = "auto",
        activation_format: ActivationFormat = "nvfp4",
        activation_scale: ActivationScale = "static",
        swiglu_limit: float | None = None,
        route_weight: RouteWeight = "output",
        batch_invariant: bool = False,
        expert_map: Tensor | None = None,
        workspace: Workspace | None = None,
        l1_scale_policy: L1ScalePolicy = "max",
    ):
        self._config = MoEConfig(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            max_num_tokens=max_num_tokens,
            top_k=top_k,
            experts_start_idx=experts_start_idx,
            activation_format=activation_format,
            activation_scale=activation_scale,
            swiglu_limit=swiglu_limit,
            route_weight=route_weight,
            batch_invariant=batch_invariant,
            l1_scale_policy=l1_scale_policy,
        )
        self.device = _with_index(torch.device(device))
        self._requested_backend = backend
        self._backend = choose(backend, self._config, self.device)(self._config, self.device)
        self._expert_map = checked_expert_map(expert_map, num_experts, self.device)
        self._workspace = workspace if workspace is not None else default_workspace(self.device)
        if self._workspace.device != self.device:
            raise ConfigError(f"workspace is on {self._workspace.device}, the layer on {self.device}")
        self._scratch: Tensor | None = None
        self._packed: Packed | None = None
        self._static_scales: InputScales | None = None
        self._calibrated_scales: InputScales | None = None
        self._calibration_amax: tuple[Tensor, Tensor] | None = None
        self._warm = False
        self._runner_id = register_runner(self)

    # What this layer is.

    @property
    def config(self) -> MoEConfig:
        """The settings in force."""
        return self._config

    @property
    def backend_name(self) -> str:
        """The backend that runs this layer."""
        return self._backend.name

    @property
    def runner_id(self) -> int:
        """The handle under which ``torch.ops.nvfp4.moe_gemm`` finds this layer."""
        return self._runner_id

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the packed weights, scales included; 0 before they are prepared."""
        return self._packed.nbytes if self._packed is not None else 0

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch that this layer needs for ``max_num_tokens``."""
        return self._backend.workspace_bytes(self._config, self.device)

    def explain_backends(self) -> dict[str, Verdict]:
        """Every backend's word on this layer: usable, or why not."""
        return explain_all(self._config, self.device)

    # Settings.

    def set_swiglu_limit(self, limit: float | None) -> None:
        """Change the clamp of SwiGLU; None for no clamp.

        Raises:
            ConfigError: not a positive finite number.
            StateError: after :meth:`warmup`: compiled kernels and captured graphs hold the old limit.
        """
        self._reconfigure("set_swiglu_limit", replace(self._config, swiglu_limit=limit))

    def set_fused_swiglu(self, fused: bool) -> None:
        """Allow a backend to apply SwiGLU in GEMM 1's epilogue (the default) or not. No effect on the numbers.

        Raises:
            BackendError: the layer's backend cannot keep them apart.
            StateError: after :meth:`warmup`.
        """
        self._reconfigure("set_fused_swiglu", replace(self._config, fused_swiglu=bool(fused)))

    def _reconfigure(self, setter: str, config: MoEConfig) -> None:
        if config == self._config:
            return
        if self._warm:
            raise StateError(
                f"{setter} after warmup: compiled kernels and captured graphs would keep the old value. "
                f"Call it before warmup, or build a new layer"
            )
        verdict = self._backend.explain(config, self.device)
        if not verdict.usable:
            raise BackendError(f"{setter}: the {self._backend.name} backend cannot do that: {verdict.reason}")
        self._backend = type(self._backend)(config, self.device)
        self._config = config
        self._scratch = None  # another setting may need more

    # Weights.

    def prepare_weights_from_stacked(
        self,
        l1_fp4_stacked: Tensor,
        l1_sf_stacked: Tensor,
        l1_gs: Tensor,
        l2_fp4_stacked: Tensor,
        l2_sf_stacked: Tensor,
        l2_gs: Tensor,
        *,
        l1_input_scale: Tensor | float | None = None,
        l2_input_scale: Tensor | float | None = None,
    ) -> None:
        """Take NVFP4 weights as a checkpoint stacks them and pack them for the backend.

        A second call packs in place: captured graphs stay valid and use the new weights.

        Args:
            l1_fp4_stacked: uint8 ``[E, 2I, H/2]``, rows of gate, then of up.
            l1_sf_stacked: float8_e4m3fn ``[E, 2I, H/16]``.
            l1_gs: fp32 ``[E]``, or ``[E, 2]`` when gate and up have their own.
            l2_fp4_stacked: uint8 ``[E, H, I/2]``.
            l2_sf_stacked: float8_e4m3fn ``[E, H, I/16]``.
            l2_gs: fp32 ``[E]``.
            l1_input_scale: global scale of GEMM 1's activations (multiplier, amax/2688), scalar or ``[E]``.
            l2_input_scale: the same for GEMM 2's.

        Raises:
            InputError: a shape or dtype does not fit, or a scale is NaN, Inf, negative or (global) zero.
            StateError: a warmed-up layer with static scales is given weights without them.
        """
        weights = MoEWeights.checked(
            self._config, l1_fp4_stacked, l1_sf_stacked, l1_gs, l2_fp4_stacked, l2_sf_stacked, l2_gs
        )
        if (l1_input_scale is None) != (l2_input_scale is None):
            raise InputError("l1_input_scale and l2_input_scale: expected both or neither, found one")
        if l1_input_scale is not None and l2_input_scale is not None:
            e = self._config.num_experts
            l1 = per_expert_scales("l1_input_scale", l1_input_scale, e, self.device)
            l2 = per_expert_scales("l2_input_scale", l2_input_scale, e, self.device)
            self._take_static_scales(l1, l2)
        elif self._static_scales is not None:
            if self._warm:
                raise StateError(
                    "this layer was warmed up with static input scales and is now given weights without them: captured "
                    "graphs would use the old scales. Pass l1_input_scale and l2_input_scale, or build a new layer"
                )
            self._static_scales = None
        with on_device(self.device):
            if self._packed is None:
                self._prove_backend()
            self._packed = self._backend.pack(weights, self._packed)
        # What was observed with the old weights says nothing about the new ones.
        self._calibration_amax = None

    def _prove_backend(self) -> None:
        """Before real weights are packed: settle on a backend that agrees with the reference on this device."""
        proven = choose(self._requested_backend, self._config, self.device, proven=True)
        if proven is not type(self._backend):
            self._backend = proven(self._config, self.device)
            self._scratch = None

    def _take_static_scales(self, l1: Tensor, l2: Tensor) -> None:
        low, high = l1.min().item(), l1.max().item()
        merged = self._config.quantizes_activations and self._config.l1_scale_policy == "max"
        if merged and self._config.activation_scale == "static" and low != high:
            _log.info(
                "l1_input_scale differs by expert (%g to %g): merged to the largest, to quantize a token once; "
                'l1_scale_policy="per_expert" keeps them apart',
                low,
                high,
            )
        self._static_scales = InputScales.updated(self._static_scales, l1, l2)

    def expert_tensors(self) -> dict[str, Tensor]:
        """What the prepared layer holds of its experts, ``[E, ...]`` each: row e is all there is of local expert e.

        Not copies. Rows copied from here to there, within a layer or between layers of one configuration and backend,
        move an expert in place, and captured graphs compute with it: this is how a load balancer replaces experts one
        by one. Static scales that ``l1_scale_policy="max"`` merges stay those of the last ``prepare_*``; where rows are
        exchanged, use ``"per_expert"``.

        Returns:
            ``experts`` uint8 ``[E, bytes]``, ``l1_gs`` fp32 ``[E, 2]``, ``l2_gs`` fp32 ``[E]`` and, if the layer has
            static input scales, ``l1_input_scale`` and ``l2_input_scale``, fp32 ``[E]``.

        Raises:
            StateError: no weights yet.
        """
        packed = self._packed
        if packed is None:
            raise StateError("this layer has no weights yet: call prepare_weights_from_stacked first")
        tensors = {"experts": packed.experts, "l1_gs": packed.l1_gs, "l2_gs": packed.l2_gs}
        if self._static_scales is not None:
            tensors |= {"l1_input_scale": self._static_scales.l1, "l2_input_scale": self._static_scales.l2}
        return tensors

    def prepare_weights_direct(
        self,
        l1_fp4: Sequence[Tensor],
        l1_sf: Sequence[Tensor],
        l1_gs: Sequence[Tensor | float] | Tensor,
        l2_fp4: Sequence[Tensor],
        l2_sf: Sequence[Tensor],
        l2_gs: Sequence[Tensor | float] | Tensor,
    ) -> None:
        """Deprecated: weights as lists per expert, ``fp4 [K/2, N]`` and ``sf [K/16, N]`` (input features first).

        Use :meth:`prepare_weights_from_stacked`, which needs no transposed copy.
        """
        self.prepare_weights_from_stacked(
            stack_experts("l1_fp4", [w.t() for w in l1_fp4]),
            stack_experts("l1_sf", [s.t() for s in l1_sf]),
            stack_experts("l1_gs", [torch.as_tensor(g, dtype=torch.float32).squeeze() for g in l1_gs]),
            stack_experts("l2_fp4", [w.t() for w in l2_fp4]),
            stack_experts("l2_sf", [s.t() for s in l2_sf]),
            stack_experts("l2_gs", [torch.as_tensor(g, dtype=torch.float32).squeeze() for g in l2_gs]),
        )

    def prepare_weights_from_dequantized(
        self, l1_weights_bf16: Sequence[Tensor], l2_weights_bf16: Sequence[Tensor]
    ) -> None:
        """Deprecated: quantize floating-point weights, lists per expert, ``[2I, H]`` (gate, then up) and ``[H, I]``.

        Each expert gets one global scale for gate and up together and one for down. Prefer quantizing once, offline.
        """
        l1 = [Nvfp4Tensor.quantize(w) for w in l1_weights_bf16]
        l2 = [Nvfp4Tensor.quantize(w) for w in l2_weights_bf16]
        self.prepare_weights_from_stacked(
            stack_experts("l1_weights_bf16", [q.codes for q in l1]),
            stack_experts("l1_weights_bf16", [q.sf for q in l1]),
            stack_experts("l1_weights_bf16", [q.gs for q in l1]),
            stack_experts("l2_weights_bf16", [q.codes for q in l2]),
            stack_experts("l2_weights_bf16", [q.sf for q in l2]),
            stack_experts("l2_weights_bf16", [q.gs for q in l2]),
        )

    # Activation scales from data.

    def compute_activation_global_scales(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Observe one batch: the running maximum of what reaches each expert's GEMMs, as global scales.

        The batch runs with unquantized activations. Only slots of local experts are seen, and rows that hold a NaN or
        Inf are left out. The result serves ``activation_scale="calibrated"``, and ``"static"`` where the weights came
        without input scales. An expert that no slot reached takes the largest scale of the others.

        Args:
            hidden_states: bf16 ``[T, H]``.
            topk_weights: fp32 ``[T, k]``.
            topk_ids: int32 or int64 ``[T, k]``, global.

        Returns:
            fp32 ``(l1 [E], l2 [E])``, copies of the scales after this batch (``amax / 2688``, multipliers).
        """
        self._check_inputs(hidden_states, topk_weights, topk_ids, None)
        packed, scratch = self._ready()
        if self._calibration_amax is None:
            zeros = torch.zeros(self._config.num_experts, dtype=torch.float32, device=self.device)
            self._calibration_amax = (zeros, zeros.clone())
        running = self._calibration_amax
        if hidden_states.shape[0]:
            with self._workspace.exclusive():
                seen = self._backend.activation_amax(
                    packed, Call(hidden_states, topk_weights, topk_ids, self._expert_map), scratch
                )
            for amax, new in zip(running, seen, strict=True):
                torch.maximum(amax, new, out=amax)
        l1, l2 = (global_scale(torch.where(amax > 0, amax, amax.amax())) for amax in running)
        self._calibrated_scales = InputScales.updated(self._calibrated_scales, l1, l2)
        return l1, l2

    # Running.

    def warmup(self, token_budgets: Sequence[int] | None = None) -> None:
        """Compile and allocate everything that :meth:`run` needs, for these numbers of tokens.

        For ids of either width, with and without an int32 ``num_valid_tokens``, and every dtype of results.

        Args:
            token_budgets: by default 1, 2, 4, ... up to ``max_num_tokens``, which is always included, and what the
                backend needs beside them, so that no later call compiles anything, whatever its number of tokens.

        Raises:
            StateError: no weights yet.
            ConfigError: a budget outside ``1 .. max_num_tokens``.
        """
        most = self._config.max_num_tokens
        if token_budgets is None:
            powers = (1 << i for i in range(most.bit_length()) if 1 << i < most)
            token_budgets = sorted({*powers, most, *self._backend.budgets()})
        for budget in token_budgets:
            if not 1 <= budget <= most:
                raise ConfigError(f"warmup: token budgets must be in 1 .. max_num_tokens = {most}, found {budget}")
        packed, scratch = self._ready()
        with self._workspace.exclusive():
            for budget in token_budgets:
                self._backend.warmup(packed, scratch, self._sample_calls(budget))
        self._warm = True

    def _sample_calls(self, tokens: int) -> list[Call]:
        """Something to warm up with, in every form that ids and padding come in: every expert gets its share."""
        cfg = self._config
        slots = torch.arange(tokens * cfg.top_k, device=self.device).view(tokens, cfg.top_k)
        ones = torch.ones(cfg.num_experts, dtype=torch.float32, device=self.device)
        fixed = cfg.quantizes_activations and cfg.activation_scale in ("static", "calibrated")
        call = Call(
            torch.ones(tokens, cfg.hidden_size, dtype=torch.bfloat16, device=self.device),
            torch.ones(tokens, cfg.top_k, dtype=torch.float32, device=self.device),
            slots % cfg.num_experts + cfg.experts_start_idx,
            self._expert_map,
            input_scales=InputScales.updated(None, ones, ones) if fixed else None,
        )
        valid = torch.full((1,), tokens, dtype=torch.int32, device=self.device)
        return [
            replace(call, topk_ids=ids, num_valid_tokens=padding)
            for ids in (call.topk_ids, call.topk_ids.int())
            for padding in (None, valid)
        ]

    def run(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_indices: object = None,
        *,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        num_valid_tokens: Tensor | None = None,
    ) -> Tensor:
        """The combined output of the local experts.

        Args:
            hidden_states: bf16 ``[T, H]``, ``T <= max_num_tokens``.
            topk_weights: fp32 ``[T, k]``.
            topk_ids: int32 or int64 ``[T, k]``, global ids; negative and non-local ids contribute nothing.
            expert_indices: accepted for callers of an older interface and not used: which experts are active follows
                from ``topk_ids``, on the device.
            out: where to write, ``[T, H]``; may not overlap the inputs. Allocated if None.
            out_dtype: bf16 by default; fp32 lets the ranks of expert parallelism be summed before rounding.
            num_valid_tokens: integer ``[1]`` on the device; rows from there on are padding and come out zero.

        Returns:
            ``[T, H]``: ``out``, or a new tensor.

        Raises:
            InputError: a shape, dtype or device does not fit.
            StateError: no weights, no activation scales, or capturing a CUDA graph before :meth:`warmup`.
        """
        if torch.compiler.is_compiling():
            return nvfp4_moe_gemm(
                hidden_states,
                topk_weights,
                topk_ids,
                self._runner_id,
                self._config.hidden_size,
                out=out,
                out_dtype=out_dtype,
                num_valid_tokens=num_valid_tokens,
            )
        return self._run_impl(
            hidden_states, topk_weights, topk_ids, out=out, out_dtype=out_dtype, num_valid_tokens=num_valid_tokens
        )

    def _run_impl(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_indices: object = None,
        *,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        num_valid_tokens: Tensor | None = None,
    ) -> Tensor:
        """:meth:`run` without the detour of ``torch.compile``; what the torch op calls."""
        self._check_inputs(hidden_states, topk_weights, topk_ids, num_valid_tokens)
        out = self._checked_out(hidden_states, out, out_dtype)
        if not self._warm and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise StateError("run during CUDA graph capture before warmup: call warmup() first, outside the capture")
        packed, scratch = self._ready()
        scales = self._input_scales()
        if hidden_states.shape[0]:
            with self._workspace.exclusive():
                call = Call(hidden_states, topk_weights, topk_ids, self._expert_map, num_valid_tokens, scales)
                self._backend.run(packed, call, scratch, out)
        return out

    def _ready(self) -> tuple[Packed, Tensor]:
        if self._packed is None:
            raise StateError("this layer has no weights yet: call prepare_weights_from_stacked first")
        if self._scratch is None:
            self._scratch = self._workspace.reserve(self.workspace_nbytes)
        return self._packed, self._scratch

    def _input_scales(self) -> InputScales | None:
        """The scales fixed ahead, if this layer's mode uses any."""
        cfg = self._config
        if not cfg.quantizes_activations or cfg.activation_scale in ("token", "tensor"):
            return None
        scales = self._calibrated_scales
        if cfg.activation_scale == "static" and self._static_scales is not None:
            scales = self._static_scales
        if scales is None:
            static = cfg.activation_scale == "static"
            lacks = "the weights came without input scales" if static else "nothing was observed yet"
            raise StateError(
                f'activation_scale="{cfg.activation_scale}", but {lacks}: pass l1_input_scale and l2_input_scale with '
                f"the weights, call compute_activation_global_scales on sample data, or choose "
                f'activation_scale="token" or activation_format="bf16"'
            )
        return scales

    # Arguments.

    def _check_inputs(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_valid_tokens: Tensor | None
    ) -> None:
        cfg = self._config
        tokens = hidden_states.shape[0] if isinstance(hidden_states, Tensor) and hidden_states.dim() else 0
        check_tensor("hidden_states", hidden_states, torch.bfloat16, (tokens, cfg.hidden_size), self.device)
        check_tensor("topk_weights", topk_weights, torch.float32, (tokens, cfg.top_k), self.device)
        check_tensor("topk_ids", topk_ids, (torch.int32, torch.int64), (tokens, cfg.top_k), self.device)
        if tokens > cfg.max_num_tokens:
            raise InputError(
                f"hidden_states: {tokens} tokens, but this layer was built for max_num_tokens = {cfg.max_num_tokens}"
            )
        if num_valid_tokens is not None:
            check_tensor("num_valid_tokens", num_valid_tokens, (torch.int32, torch.int64), (1,), self.device)

    def _checked_out(self, hidden_states: Tensor, out: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
        if out is None:
            dtype = torch.bfloat16 if out_dtype is None else out_dtype
            if dtype not in OUT_DTYPES:
                raise InputError(f"out_dtype: expected one of {dtype_names(OUT_DTYPES)}, found {dtype}")
            return torch.empty(hidden_states.shape, dtype=dtype, device=self.device)
        allowed = OUT_DTYPES if out_dtype is None else (out_dtype,)
        check_tensor("out", out, allowed, tuple(hidden_states.shape), self.device)
        return out


def _with_index(device: torch.device) -> torch.device:
    """``cuda`` -> ``cuda:0``: tensors report an index, and devices are compared."""
    if device == torch.device("cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
