"""Language models and tokenizers of transformers, imported when they are wanted."""

from typing import Any

from flops_lightning.errors import SettingError


def transformers(setting: str, value: object) -> Any:
    """The package.

    Raises:
        SettingError: it is not installed; ``setting`` and ``value`` are what wanted it.
    """
    try:
        import transformers as package
    except ImportError as error:
        raise SettingError(setting, value, "needs the package transformers.", 'Run pip install -e ".[llm]".') from error
    return package


def load_language_model(name: str, *, setting: str = "llm", **settings: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, by name or folder; ``settings`` are ``from_pretrained``'s.

    Raises:
        SettingError: transformers are not installed, or find nothing under this name.

    Example:
        >>> load_language_model("no/such/model", local_files_only=True)
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: llm = 'no/such/model': cannot be loaded: ...
    """
    package = transformers(setting, name)
    try:
        model = package.AutoModelForCausalLM.from_pretrained(name, **settings)
        tokenizer = package.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        remedy = "Write the name of a causal language model on the hub, or a folder with its files."
        raise SettingError(setting, name, f"cannot be loaded: {said}.", remedy) from error
    return model, tokenizer
