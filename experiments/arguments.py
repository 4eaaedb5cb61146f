"""The argument string of a config file, `size=demo,data=PATH`, against its defaults."""

from types import SimpleNamespace

from genret.types import InputError


def parse(argument: str, **defaults: str) -> SimpleNamespace:
    """Strings in, strings out; raises InputError for a name that has no default."""
    values = dict(defaults)
    for part in filter(None, argument.split(",")):
        name, equals, value = part.partition("=")
        if name not in defaults or not equals:
            raise InputError(
                "--config", f"cannot read {part!r}", f"use name=value with {', '.join(defaults)}"
            )
        values[name] = value
    return SimpleNamespace(**values)


def number(name: str, text: str) -> float:
    """The number in `text`; raises InputError where there is none."""
    try:
        return float(text)
    except ValueError:
        raise InputError(name, f"cannot read {text!r}", f"write {name}=0.05") from None
