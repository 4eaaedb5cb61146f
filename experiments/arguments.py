"""What configs share: their argument string, `size=demo,data=PATH`, and the options of a run of `fit`."""

import re
from types import SimpleNamespace
from typing import Any

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


def seeds(text: str) -> tuple[int, ...]:
    """0+1+2 as a tuple; raises InputError for what is not."""
    if not re.fullmatch(r"[0-9]{1,9}([+][0-9]{1,9})*", text):
        raise InputError("seeds", f"cannot read {text!r}", "write seeds=0+1+2")
    return tuple(int(s) for s in text.split("+"))


def fit_options(steps: int, learning_rate: float, **changes: Any) -> dict[str, Any]:
    """A section that becomes `training.loop.FitOptions`."""
    options = dict(
        steps=steps,  # optimiser steps
        learning_rate=learning_rate,  # peak; AdamW(0.9, 0.95)
        warmup=max(1, min(200, steps // 10)),  # steps, linear
        weight_decay=0.01,  # on matrices
        clip=1.0,  # global gradient norm
        ema_decay=0.999 if steps > 1000 else 0.99,  # of the averaged parameters (papers' A.4)
        microbatches=1,  # gradient accumulation; results do not depend on it
        log_every=max(1, min(100, steps // 5)),  # steps
        save_every=500,  # steps
        keep=2,  # checkpoints
    )
    return options | changes
