"""One recipe on two hosts under torchrun: two network namespaces, or loopback addresses where none are permitted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_trainer import losses
from train_toy import toy, trainer

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
HOSTS = ("10.213.0.1", "10.213.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str] | str]:
    """Names of two network namespaces joined by one cable, or why there are none."""
    if shutil.which("ip") is None:
        yield "there is no `ip` here"
        return
    names = [f"fastmllm{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    except subprocess.CalledProcessError as error:
        yield f"network namespaces are not permitted here: {error.stderr.strip()}"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


def run_on(prefixes: list[list[str]], addresses: tuple[str, ...], interface: str, out: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"GLOO_SOCKET_IFNAME": interface, "TP_SOCKET_IFNAME": interface}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", addresses[0], "--master_port", "29713"]
    script = [str(HERE / "hosts_worker.py"), str(out)]
    agents = [
        subprocess.Popen(
            [*prefix, *command, "--node_rank", str(rank), "--local_addr", address, *script],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, (prefix, address) in enumerate(zip(prefixes, addresses, strict=True))
    ]  # fmt: skip
    try:
        for rank, agent in enumerate(agents):
            said = agent.communicate(timeout=150)[0]
            assert agent.returncode == 0, said[-4000:]
            assert f"rank {rank} of host {rank} done" in said
    finally:
        for agent in agents:
            agent.kill()


def assert_as_one_process(out: Path) -> None:
    trainer(out / "one", toy(), engine={"accumulation": 2}).run()
    for zero_stage in (2, 3):
        assert losses(out / f"run{zero_stage}") == pytest.approx(losses(out / "one"), abs=1e-6, rel=0)


def test_two_namespaces(namespaces: list[str] | str, tmp_path: Path) -> None:
    if isinstance(namespaces, str):
        pytest.skip(namespaces)
    prefixes = [["ip", "netns", "exec", name] for name in namespaces]
    # nothing but the cable joins them
    alone = subprocess.run(
        [*prefixes[1], "ip", "-o", "address"], capture_output=True, text=True, timeout=20, check=True
    )
    assert HOSTS[1] in alone.stdout
    assert HOSTS[0] not in alone.stdout
    run_on(prefixes, HOSTS, "eth0", tmp_path)
    assert_as_one_process(tmp_path)


def test_two_loopback_addresses(namespaces: list[str] | str, tmp_path: Path) -> None:
    if not isinstance(namespaces, str):
        pytest.skip("two network namespaces have shown it")
    run_on([[], []], ("127.0.0.2", "127.0.0.3"), "lo", tmp_path)
    assert_as_one_process(tmp_path)
