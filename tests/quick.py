"""Quick compiles: XLA's older emitter of loops.

It compiles what is not optimised in a third of the time, and what is in four times as much, so goldens go
without. JAX has no setting for it but XLA_FLAGS, which binds a whole process. Where JAX's own function has
moved, or XLA does not know the option, tests are slower and nothing else.
"""

import functools

import jax

try:
    from jax._src import compiler
except ImportError:
    compiler = None

EMITTER = {"xla_cpu_use_fusion_emitters": False}
users = getattr(compiler, "get_compile_options", None)


@functools.cache
def known() -> bool:
    """Whether this XLA takes the option; as a flag it would end a process that does not."""
    try:
        jax.jit(lambda: 0, compiler_options=EMITTER)()
    except Exception:  # whatever this JAX raises
        return False
    return True


def flags() -> str:
    """For XLA_FLAGS of another process, nothing of which is optimised."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in EMITTER.items()) if known() else ""


def options(*args, env_options_overrides=None, **kwargs):
    """As `users`, with the older emitter."""
    return users(*args, env_options_overrides=EMITTER | (env_options_overrides or {}), **kwargs)


def begin() -> None:
    """From now on, in this process."""
    jax.config.update("jax_disable_most_optimizations", True)
    if users and known():
        compiler.get_compile_options = options


def end(optimize: bool = True) -> None:
    """Compile as users compile; without `optimize`, by their emitters alone, whose rounding is less."""
    jax.config.update("jax_disable_most_optimizations", not optimize)
    if users:
        compiler.get_compile_options = users
