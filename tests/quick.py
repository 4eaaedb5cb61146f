"""Quick compiles: XLA's older emitter of loops, and modules in one piece.

The emitter compiles what is not optimised in a third of the time, and what is in four times as much, so
goldens go without. A module split into 32 for as many cores takes one core longer. JAX has no
setting for either but XLA_FLAGS, which binds a whole process. Where JAX's own function has moved, or XLA does
not know the options, tests are slower and nothing else.
"""

import functools

import jax

try:
    from jax._src import compiler
except ImportError:
    compiler = None

WHOLE = {"xla_cpu_parallel_codegen_split_count": 1}
OPTIONS = WHOLE | {"xla_cpu_use_fusion_emitters": False}
users = getattr(compiler, "get_compile_options", None)


@functools.cache
def known() -> bool:
    """Whether this XLA takes the options; as flags they would end a process that does not."""
    try:
        jax.jit(lambda: 0, compiler_options=OPTIONS)()
    except Exception:  # whatever this JAX raises
        return False
    return True


def flags() -> str:
    """For XLA_FLAGS of another process, nothing of which is optimised."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()) if known() else ""


def options(more, *args, env_options_overrides=None, **kwargs):
    """As `users`, with more."""
    return users(*args, env_options_overrides=more | (env_options_overrides or {}), **kwargs)


def _compile_with(more):
    if users and known():
        compiler.get_compile_options = functools.partial(options, more)


def begin() -> None:
    """From now on, in this process."""
    jax.config.update("jax_disable_most_optimizations", True)
    _compile_with(OPTIONS)


def end(optimize: bool = True) -> None:
    """Compile as users compile; without `optimize`, by their emitters alone, whose rounding is less."""
    jax.config.update("jax_disable_most_optimizations", not optimize)
    _compile_with(WHOLE)
