"""dsv4: NVFP4 mixture-of-experts inference for DeepSeek-V4-class models."""

from dsv4.config import MoEConfig
from dsv4.errors import BackendError, CheckpointError, ConfigError, Dsv4Error, InputError, StateError
from dsv4.moe import Nvfp4MoE
from dsv4.nvfp4 import Nvfp4Tensor
from dsv4.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "Dsv4Error",
    "InputError",
    "MoEConfig",
    "Nvfp4MoE",
    "Nvfp4Tensor",
    "StateError",
    "Workspace",
    "__version__",
]
