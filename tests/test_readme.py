"""The README's map is the house, its commands are there, and its links and those of docs/ lead somewhere."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_module_is_on_the_map_and_every_path_on_it_exists():
    for path in (ROOT / "genret").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in README, f"{path.relative_to(ROOT)} is not on the map"
    for name in re.findall(r"`((?:genret|experiments|launch|tests)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), f"the README names {name}"


def test_links_lead_to_files_and_headings_that_are_there():
    found = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for name, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name} links to {name}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert heading in slugs, f"{page.name} links to {name}#{heading}"
            found += 1
        for name in re.findall(r"`((?:experiments|launch|tests)/[\w/.]*\.\w+)`", text):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
    assert found > 10


def test_commands_are_executable_scripts_with_existing_configs():
    commands = [
        line
        for block in re.findall(r"```bash\n(.*?)```", README, re.S)
        for line in block.splitlines()
        if line.startswith("./")
    ]
    assert {"./launch/demo.sh", "./launch/test.sh"} <= {c.split()[0] for c in commands}
    for command in commands:
        script = ROOT / command.split()[0]
        assert script.stat().st_mode & 0o111, f"{script.name} is not executable"
        for config in re.findall(r"experiments/configs/\w+\.py", command):
            assert (ROOT / config).exists()


def test_scripts_are_valid_bash_and_ci_runs_the_test_command():
    for script in [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", script], check=True)
    assert "./launch/test.sh\n" in (ROOT / ".ci" / "run").read_text()
