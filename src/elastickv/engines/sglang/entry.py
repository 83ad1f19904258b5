"""Refusing in the process that was called, before anything is started.

SGLang loads plug-ins there as it does in its schedulers. What can be seen of arguments, variables and the model's
configuration is said there at once. A scheduler looks again when it begins, for it may have been started otherwise.
"""

from __future__ import annotations

from typing import Any

from elastickv.engines.sglang import gate
from elastickv.errors import EngineRefused

__all__ = ["check", "check_model"]


def _settled(server_args: Any) -> Any:
    """SGLang's arguments as it came to use them; 0.5.23 keeps what was asked for and what it decided apart."""
    try:
        from sglang.srt.arg_groups.model_override_base import resolving_view
    except ImportError:  # releases before it decide in place
        return server_args
    return resolving_view(server_args)


def check(server_args: Any) -> None:
    """Refuses an engine of these arguments that cannot be managed."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.environ import envs

    gate.check_arguments(server_args)
    gate.check_arguments(_settled(server_args))
    gate.check_variables(lambda name: getattr(envs, name).get() if hasattr(envs, name) else None)
    check_model(ModelConfig.from_server_args(server_args))


def check_model(model: Any) -> None:
    """Refuses a model whose blocks are not all of one kind. `model`: SGLang's ModelConfig."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import is_deepseek_dsa, is_deepseek_v4

    if is_deepseek_dsa(model.hf_config):
        found = "DeepSeek sparse attention"
    elif is_deepseek_v4(model.hf_config):
        found = "the attention of DeepSeek-V4"
    elif model.is_hybrid_swa:
        found = "sliding windows (--disable-hybrid-swa-memory gives them whole blocks)"
    elif mambaish_config(model) is not None:
        found = "states beside its blocks (Mamba, linear attention)"
    else:
        return
    raise EngineRefused(
        f"elastickv cannot manage a model with {found}: its blocks are kept apart; use a model with full attention, or "
        "unset ELASTICKV to serve without it"
    )
