"""What README, CONTRIBUTING and docs name is there: files, links, commands, make targets, settings."""

import ast
import re
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
import yaml

from domainstudio.config import AdaptationSettings, Settings, reference
from tests.modules import MODULES, ROOT
from tests.unit.test_layers import LAYERS, LEVELS

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/README.md")
    for path in ROOT.glob(pattern)
)
ROOMS = ("domainstudio", "stages", "services", "flows", "benchmarks", "tests", "docs", "deploy", "demo")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code(text):
    """Return the fenced blocks and code spans of a page."""
    fenced = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))]


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                yield f"link {link}"


def missing_paths(_page, text):
    for part in code(text):
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(ROOMS)})/[\w./-]*\w", part):
            # A prefix of outputs (`--output benchmarks/results/ink`) and a file with an example count too.
            if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}.*")):
                yield f"path {path}"


def source_of(module):
    """Return the text of one of the project's commands and of its room's `cli.py`; `None`: there is none."""
    path = ROOT / module.replace(".", "/")
    files = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.glob("*.py"))
    if not files or (path.is_dir() and not (path / "__main__.py").is_file()):
        return None
    shared = (ROOT / module.partition(".")[0]).glob("cli.py")
    return "".join(file.read_text() for file in [*files, *shared])


def wrong_commands(_page, text):
    for module, rest in re.findall(r"python -m ([\w.]+)((?:[^`\n#|&]|\\\n)*)", text):
        if module.partition(".")[0] in ROOMS:
            source = source_of(module)
            if source is None:
                yield f"python -m {module}"
                continue
            options = re.findall(r"(?<!\S)(--[a-z-]+)", rest)
            yield from (f"python -m {module} {o}" for o in options if f'"{o}"' not in source)


def wrong_targets(_page, text):
    for part in code(text):
        named = re.findall(r"(?:^|&& |\|\| )make ([a-z][a-z-]*)", part, re.MULTILINE)
        yield from (f"make {target}" for target in named if target not in TARGETS)


def partial_schema():
    """Return the schema of params.yaml in which no key is required: pages show parts of the file."""

    def without(node):
        if isinstance(node, dict):
            return {key: without(value) for key, value in node.items() if key != "required"}
        return [without(item) for item in node] if isinstance(node, list) else node

    return without(reference.schema())


VALIDATOR = jsonschema.Draft202012Validator(partial_schema())


def wrong_settings(_page, text):
    for block in blocks(text, "yaml"):
        values = yaml.safe_load(block)
        if "compute_environment" in values:  # a file of accelerate's
            continue
        if values.keys() <= AdaptationSettings.model_fields.keys():
            values = {"adaptations": {"name": values}}
        yield from (
            f"{'.'.join(map(str, fault.absolute_path))}: {fault.message}"
            for fault in VALIDATOR.iter_errors(values)
        )
    yield from (f"setting {key}" for key in settings_named(text) if not known(key.split(".")))


def settings_named(text):
    """Yield every `section.key` of code spans, and those of `dvc exp run -S`."""
    for part in code(text):
        yield from re.findall(r"-S ([\w.-]+)=", part)
        key = re.match(r"([a-z_]+(?:\.[\w*<>-]+)+)(?::.*)?$", part)
        if key and key[1].split(".")[0] in Settings.model_fields and not key[1].endswith(".py"):
            yield key[1]


def known(path, schema=VALIDATOR.schema):
    """Say whether the schema has a key; any name stands for `<name>` and `*`."""
    while "$ref" in schema:
        schema = VALIDATOR.schema["$defs"][schema["$ref"].rpartition("/")[2]]
    if not path:
        return True
    if "anyOf" in schema:
        return any(known(path, part) for part in schema["anyOf"])
    inner = schema.get("properties", {}).get(path[0]) or schema.get("additionalProperties")
    inner = inner or next(iter(schema.get("patternProperties", {}).values()), None)
    return isinstance(inner, dict) and known(path[1:], inner)


def wrong_names(_page, text):
    """Check `from domainstudio.… import name` in examples, and "`a/module.py`: `name`" in prose."""
    pairs = [(path.replace("/", "."), name) for path, name in re.findall(r"`([\w/]+)\.py`: `(\w+)`", text)]
    terms = re.findall(r"`(losses|wavelet)\.((?!py`)\w+)`", text)
    pairs += [(f"training.{module}", name) for module, name in terms]
    pairs = [(f"domainstudio.{module}", name) for module, name in pairs]
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ROOMS:
                pairs += [(str(node.module), alias.name) for alias in node.names]
    for module, name in pairs:
        if module not in MODULES or not hasattr(import_module(module), name):
            yield f"{module}: {name}"


CHECKS = (broken_links, missing_paths, wrong_commands, wrong_targets, wrong_settings, wrong_names)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("check", CHECKS)
def test_what_a_page_names_is_there(check, page):
    assert not list(check(page, (ROOT / page).read_text()))


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (broken_links, "[a](docs/nowhere.md)"),
        (broken_links, "[a](docs/operate.md#nothing)"),
        (missing_paths, "`stages/fine_tune.py`"),
        (wrong_commands, "```bash\npython -m stages.fine_tune\n```\n"),
        (wrong_commands, "`python -m stages.register --roll-back ink`"),
        (wrong_targets, "`make demos`"),
        (wrong_settings, "`finetune.stepps`"),
        (wrong_settings, "`methods.*.spaces: latent`"),
        (wrong_settings, "`dvc exp run -S methods.domainstudio.imag=0.5`"),
        (wrong_settings, "```yaml\nfinetun: {steps: 3}\n```\n"),
        (wrong_settings, "```yaml\nprompts: {sauce: a house}\n```\n"),
        (wrong_names, "`losses.mean_squared_mistake`"),
        (wrong_names, "`training/recipe.py`: `make_train`"),
        (wrong_names, "```python\nfrom domainstudio.config import lode\n```\n"),
    ],
)
def test_a_wrong_name_is_found(check, wrong):
    assert len(list(check("README.md", wrong))) == 1


def test_the_tree_names_every_room_and_no_file_that_is_not_there():
    tree = blocks((ROOT / "docs/architecture.md").read_text(), "")[0]
    folder, rooms = Path(), set()
    for line in tree.splitlines():
        name, _, text = line.strip().partition(" ")
        place = folder / name if line.startswith(" ") else Path(name)
        folder = folder if line.startswith(" ") else place
        rooms.add(place.name.removesuffix(".py"))
        missing = [
            file for file in [".", *re.findall(r"\w+\.py\b", text)] if not (ROOT / place / file).exists()
        ]
        assert not missing, f"{place}: {missing}"
    assert LEVELS.keys() <= rooms


def test_the_pages_layers_are_those_of_the_test():
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| (.*) \|$", page, re.MULTILINE)
    assert tuple(tuple(re.findall(r"`(\w+)`", row)) for row in reversed(rows)) == LAYERS
    picture = (ROOT / "docs/images/layers.svg").read_text()
    assert set(re.findall(r'class="name"[^>]*>(\w+)<', picture)) == LEVELS.keys()
