"""What a file brings under the name users type for it: one class, bound to its options, whose hooks are known by name."""

import functools
import inspect
from abc import ABC
from collections.abc import Callable
from types import FunctionType
from typing import ClassVar, Generic, ParamSpec, TypeVar, get_args

from compress.errors import nearest
from compress.strict.models import Strict

OptionsT = TypeVar("OptionsT", bound=Strict, covariant=True)
P = ParamSpec("P")
T = TypeVar("T")
NO_OPTIONS = "{name} names no options: expected class {name}({contract}[Options]), Options being a Strict model"


class ContractError(TypeError):
    """A class that is not what its contract asks for, in a sentence for whoever wrote it."""


class Plugin(ABC, Generic[OptionsT]):
    """A class that inherits from this directly is a contract: its public names are the hooks. What inherits from the
    contract may define those, as what they are there, and names of its own that begin with an underscore."""

    Options: ClassVar[type[Strict]]  # of `Pass[Options]`: the block in a recipe
    _together: ClassVar[tuple[tuple[str, str], ...]] = ()  # hooks of the contract that do nothing without each other

    def __init__(self, options: OptionsT) -> None:
        self._options = options

    @property
    def options(self) -> OptionsT:
        return self._options

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if Plugin in cls.__bases__:
            return
        contract = next(base for base in cls.__mro__ if Plugin in base.__bases__)
        refuse_other_hooks(cls, contract)
        _find_options(cls, contract)
        _refuse_half(cls)
        for name, hook in [*vars(cls).items()]:
            if isinstance(hook, FunctionType) and not name.startswith("_"):
                setattr(cls, name, _naming_itself(hook))

    @classmethod
    def _defines(cls, hook: str) -> bool:
        """Whether a hook is other than the contract's own."""
        contract = next(base for base in cls.__mro__ if Plugin in base.__bases__)
        return getattr(cls, hook) is not getattr(contract, hook)


def _naming_itself(hook: Callable[P, T]) -> Callable[P, T]:
    """The hook; an error in it is noted with its name and its file, since whoever sees it need not know them."""

    @functools.wraps(hook)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return hook(*arguments, **named)
        except Exception as error:
            error.add_note(f"in {hook.__qualname__} ({inspect.getsourcefile(hook)})")
            raise

    return call


def _find_options(cls: type[Plugin[Strict]], contract: type) -> None:
    """The `Options` in `class Cast(Pass[Options])`."""
    for base in vars(cls).get("__orig_bases__", ()):
        for argument in get_args(base):
            if isinstance(argument, type):
                cls.Options = argument
    options = getattr(cls, "Options", None)
    if not (isinstance(options, type) and issubclass(options, Strict)):
        raise ContractError(NO_OPTIONS.format(name=cls.__name__, contract=contract.__name__))


def _refuse_half(cls: type[Plugin[Strict]]) -> None:
    """Raises ContractError for a hook that does nothing without another."""
    for hooks in cls._together:
        defined = [hook for hook in hooks if cls._defines(hook)]
        if len(defined) == 1:
            (missing,) = set(hooks) - set(defined)
            raise ContractError(f"{cls.__name__} defines {defined[0]}, which does nothing without {missing}")


def refuse_other_hooks(cls: type, contract: type) -> None:
    """Raises ContractError for a public name that is no hook of the contract, which would never be looked at, and for a hook
    that is something else than it is there."""
    for name in vars(cls):
        if not name.startswith("_") and name != "Options":
            _refuse_other_hook(cls, name, contract)


def _refuse_other_hook(cls: type, name: str, contract: type) -> None:
    hooks = sorted(hook for hook in {*dir(contract), *contract.__annotations__} if not hook.startswith("_"))
    if name not in hooks:
        raise ContractError(f"{cls.__name__}.{name} is no hook of {contract.__name__}{nearest(name, hooks)}")
    theirs, asked = vars(cls)[name], inspect.getattr_static(contract, name, None)
    if isinstance(theirs, FunctionType) != isinstance(asked, FunctionType):
        kind = "a method" if isinstance(asked, FunctionType) else "a property or a value, not a method"
        raise ContractError(f"{cls.__name__}.{name} must be {kind}")
    if isinstance(theirs, FunctionType):
        _refuse_other_arguments(cls, name, theirs, asked)


def _refuse_other_arguments(cls: type, name: str, theirs: FunctionType, asked: FunctionType) -> None:
    expected = inspect.signature(asked)
    try:
        inspect.signature(theirs).bind(*expected.parameters)
    except TypeError:
        takes, given = (", ".join(inspect.signature(function).parameters) for function in (theirs, asked))
        raise ContractError(f"{cls.__name__}.{name} takes ({takes}), but is given ({given})") from None
