"""Language models and tokenizers of transformers, imported when they are wanted."""

import json
from collections.abc import Mapping
from typing import Any

from flops_lightning.errors import SettingError, import_extra


def as_written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``from_pretrained``'s arguments as a file of settings has them: a quantiser's config is a mapping.

    Example:
        >>> as_written({"dtype": "float32"})
        {'dtype': 'float32'}
    """
    return {
        name: json.loads(json.dumps(value.to_dict(), default=str)) if hasattr(value, "to_dict") else value
        for name, value in settings.items()
    }


def load_language_model(name: str, *, setting: str = "llm", **settings: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, by name or folder; ``settings`` are ``from_pretrained``'s.

    Raises:
        SettingError: transformers are not installed, or find nothing under this name.

    Example:
        >>> load_language_model("no/such/model", local_files_only=True)
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: llm = 'no/such/model': cannot be loaded: ...
    """
    return load_model(name, setting=setting, **settings), load_tokenizer(name, setting=setting)


def load_model(name: str, *, setting: str, **settings: Any) -> Any:
    """The model alone; see :func:`load_language_model`."""
    return _loaded("AutoModelForCausalLM", "causal language model", name, setting, settings)


def load_tokenizer(name: str, *, setting: str) -> Any:
    """The tokenizer alone; see :func:`load_language_model`."""
    return _loaded("AutoTokenizer", "tokenizer", name, setting, {})


def _loaded(kind: str, what: str, name: str, setting: str, settings: dict[str, Any]) -> Any:
    package = import_extra("transformers", extra="llm", setting=setting, value=name)
    remedy = f"Write the name of a {what} on the hub, or a folder with its files."
    if not isinstance(name, str) or not name:
        raise SettingError(setting, name, f"is not the name of a {what}.", remedy)
    try:
        return getattr(package, kind).from_pretrained(name, **settings)
    # Transformers assert a form of quantization_config, and of what a quantiser raised report a RuntimeError.
    except (OSError, ValueError, TypeError, AttributeError, ImportError, AssertionError, RuntimeError) as error:
        if settings and not isinstance(error, (OSError, ValueError)):  # a misspelt argument, or a package for one
            remedy = f"Correct the arguments of from_pretrained, {sorted(settings)}, or install what they need."
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise SettingError(setting, name, f"cannot be loaded: {said}.", remedy) from error
