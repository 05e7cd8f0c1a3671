"""What docs/clusters.md and the launchers say can be run: every `diptych` command parses, shells and YAML are sound."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from diptych.cli import _parser

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "h200_bench.sh"
LAUNCHERS = sorted({*(ROOT / "scripts").glob("*.s[bh]*")} - {BENCH}) + sorted((ROOT / "scripts").glob("*.yaml"))
SHELLS = [BENCH, *(path for path in LAUNCHERS if path.suffix != ".yaml")]
FILES = [ROOT / "docs" / "clusters.md", ROOT / "scripts" / "two_process_cpu.py", BENCH, *LAUNCHERS]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `diptych COMMAND ...` in a text. Variables of a shell stand for one word, its list of
    arguments ("$@", or a variable glued to the word before) for none."""
    joined = re.sub(r"\\\n\s*|(?<=first)\n\s+(?=--)", " ", text)
    found = []
    for match in re.finditer(
        r"\bdiptych (?=(?:run|plan|bench|generate|eval|export|compare|report) )([^`\n#&<>|]+)", joined
    ):
        line = re.sub(r'"?\$@"?|(?<=\w)\$\w+|\$\{@\}', "", match[1])
        found.append(shlex.split(re.sub(r'"?\$\{?\w+\}?"?', "word", line)))
    return found


def problem(arguments: list[str]) -> str | None:
    try:
        _, left_over = _parser().parse_known_args(arguments)
    except SystemExit:
        return f"does not parse: {arguments}"
    odd = [text for text in left_over if "=" not in text or text.startswith("-")]
    return f"{odd} in {arguments}" if odd else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_parse(path):
    for arguments in commands(path.read_text(encoding="utf-8")):
        assert problem(arguments) is None


def test_the_commands_are_found():
    found = {path.name: commands(path.read_text(encoding="utf-8")) for path in FILES}
    assert len(found["clusters.md"]) >= 6
    for launcher in LAUNCHERS:
        (command,) = [one for one in found[launcher.name] if one[0] == "run"]
        assert {"--distributed", "--resume", "--engine", "--output"} <= set(command), launcher.name
    assert ["plan", "my.yaml", "--topology", "v5e:4x4"] in found["clusters.md"]
    assert sum("torch" in command for command in found["clusters.md"]) >= 4


@pytest.mark.parametrize(
    "line", ["diptych run a.yaml --engine jax --distribute-me", "diptych run a.yaml --engine tpu", "diptych run"]
)
def test_canary_a_wrong_command_is_seen(line):
    (arguments,) = commands(line + " \n") or [[]]
    assert problem(arguments) is not None


@pytest.mark.parametrize("path", SHELLS, ids=lambda path: path.name)
def test_shells_are_sound(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert "\t" not in text


def test_the_tpu_script_keeps_words_together(tmp_path):
    """Names with spaces and settings in braces arrive on the VMs as they were given."""
    (tmp_path / "gcloud").write_text(
        '#!/bin/bash\nfor word in "$@"; do\n'
        '  case "$word" in --command=*) HOME=$FAKE bash -c "${word#--command=}";; esac\ndone\n'
    )
    binaries = tmp_path / "diptych-venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "diptych").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for script in (tmp_path / "gcloud", binaries / "diptych"):
        script.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FAKE": str(tmp_path), "TPU_NAME": "slice", "ZONE": "z"}
    command = ["bash", str(ROOT / "scripts/tpu_vm.sh"), "run", "my recipe.yaml", "/shared/o", "rl.adapter={rank: 8}"]
    subprocess.run(command, check=True, env=environment)
    log = tmp_path / "diptych.log"
    for _ in range(100):
        if log.exists() and log.read_text().endswith("{rank: 8}\n"):
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert log.read_text().splitlines() == [
        "run", "my recipe.yaml", "--engine", "jax", "--output", "/shared/o", "--distributed", "--resume",
        "rl.adapter={rank: 8}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("job", "hosts", "address"),
    [("7", "gpu-3\ngpu-4\n", "gpu-3:20007"), ("1234567", "gpu-9\n", "gpu-9:34567")],
    ids=["two nodes", "one node"],
)
def test_slurm_tells_torchs_processes_where_the_first_one_is(tmp_path, job, hosts, address):
    """What srun is called with, and the variables that the torch engine reads in each of its tasks."""
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n[[ $* == 'show hostnames gpu-[3-9]' ]] && printf '{hosts}'\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$MASTER_ADDR:$MASTER_PORT" "${http_proxy-}" "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "gpu-[3-9]", "SLURM_JOB_ID": job, "http_proxy": "http://p",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts/slurm_torch.sbatch"), "my recipe.yaml", "/shared/o", "rl.adapter={rank: 8}"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        address, "", "--label", "--kill-on-bad-exit=1", "--gpu-bind=none", "diptych", "run", "my recipe.yaml",
        "--engine", "torch", "--output", "/shared/o", "--distributed", "--resume", "rl.adapter={rank: 8}",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sbatch")), ids=lambda path: path.name)
def test_slurm_gives_every_gpu_a_process_that_drives_it(path):
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", path.read_text(encoding="utf-8"), flags=re.M))
    assert (
        asked["ntasks-per-node"] == {"slurm_jax.sbatch": "1", "slurm_torch.sbatch": asked["gpus-per-node"]}[path.name]
    )


def test_the_deepspeed_launcher_may_say_which_process_this_is():
    """It puts --local_rank before everything else."""
    options = _parser().parse_args(["--local_rank=3", "run", "a.yaml", "--engine", "torch", "--distributed"])
    assert options.distributed
    assert "local_rank" not in _parser().format_help()


def test_the_jobset_has_a_pod_for_every_host():
    job = yaml.safe_load((ROOT / "scripts" / "gke_tpu.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    (container,) = pod["containers"]
    assert spec["parallelism"] == spec["completions"] == chips / container["resources"]["limits"]["google.com/tpu"]
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claims
