"""Two hosts, each in a network namespace of its own, and the cable between them is pulled."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genret.training import processes
from tests.commands import ENVIRONMENT, ROOT, command

pytestmark = pytest.mark.faults
READY = '(workdir / f"at_{index}").touch()'
WAYS = {
    "apart": f"{READY}\ntime.sleep(300)",
    "in a barrier": f"{READY}\nprocesses.barrier('never') if index else time.sleep(300)",
    "in collectives": f"""
x = jax.make_array_from_callback((2,), NamedSharding(make_mesh(), P("data")), lambda at: jnp.ones(1))
total = jax.jit(jnp.sum)
while True:
    jax.block_until_ready(total(x))
    {READY}
""",
}


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces, 10.213.0.1 and .2, joined by a cable whose ends are `cable`."""
    names = [f"genret{os.getpid()}{end}" for end in "ab"]
    if any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("network namespaces are not permitted here")
    ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
    for i, name in enumerate(names, 1):
        ip("-n", name, "addr", "add", f"10.213.0.{i}/24", "dev", "cable")
        for device in ("cable", "lo"):
            ip("-n", name, "link", "set", device, "up")
        # Gloo listens at the address of the host's own name.
        folder = Path("/etc/netns", name)
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.213.0.{i} {os.uname().nodename}\n")
    yield names
    for name in names:
        ip("netns", "del", name)
        (Path("/etc/netns", name) / "hosts").unlink()
        Path("/etc/netns", name).rmdir()


@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_loses_its_network_ends_both_by_name_within_a_minute(tmp_path, hosts, way):
    """Nothing tells a process of it but probes that nobody answers."""
    flags = [*command(WAYS[way], tmp_path), "--multihost"]
    flags += ["--coordinator=10.213.0.1:8476", "--num_processes=2"]
    environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": ""}  # a device each
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, *flags, f"--process_id={i}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, name in enumerate(hosts)
    ]  # fmt: skip
    try:
        while not all((tmp_path / f"at_{i}").exists() for i in (0, 1)):
            assert all(process.poll() is None for process in started), started[0].communicate()
            time.sleep(0.05)
        time.sleep(1.0)
        began = time.monotonic()
        assert not ip("-n", hosts[1], "link", "set", "cable", "down").returncode
        said = [process.communicate(timeout=60)[1] for process in started]
        print(f"{way}: {time.monotonic() - began:.1f} s")
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [processes.AGAIN] * 2, said
    for i in (0, 1):
        assert f"another process is gone (process {1 - i} of 2: its connection ended)" in said[i], said
