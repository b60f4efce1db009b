"""The overlay for the configuration: the classes that a page learned, for the workflow."""

from typing import Any

import yaml

from lpovod.formats.model import ModelClass, ModelFile


def overlay_of(content: ModelFile) -> str:
    """Yaml that adds the learned classes to the run's configuration.

    A configuration has no place for corrections and pictures: comments name them.
    """
    configured, learned = content.config.classes, [c for c in content.classes if c.learned]
    added = [c.name for c in learned if c.name not in configured.novel]
    prompts = {
        c.name: c.prompt for c in learned if c.prompt and configured.prompts.get(c.name) != c.prompt
    }
    classes: dict[str, Any] = {}
    if added:
        # A list replaces those of the overlays below it, so the whole one is written.
        classes |= {"novel": [*configured.novel, *added], "add_novel": []}
    if prompts:
        classes["prompts"] = prompts
    lines = [
        f"# An overlay for {content.config.name}'s configuration:",
        "# to be laid over those that the run used:",
        "#   snakemake --cores all --configfile [ITS OVERLAYS] OVERLAY.yaml",
        *(f"# {line}" for c in learned for line in _inexpressible(c)),
    ]
    body = yaml.safe_dump({"classes": classes} if classes else {}, allow_unicode=True)
    return "\n".join(lines) + "\n" + (body if classes else "{}  # no class was added\n")


def _inexpressible(of_class: ModelClass) -> list[str]:
    """What a configuration cannot say of a class."""
    lesson, name = of_class.learned or {}, of_class.name
    lines = []
    for word, meaning in (("drop", "dropped"), ("keep", "added")):
        if keys := lesson.get(word):
            lines.append(
                f"{name}: a person {meaning} {len(keys)} of the retrieved regions, which only the "
                f"model file holds: {' '.join(keys)}"
            )
    if pictures := lesson.get("pictures"):
        beside = "beside" if lesson.get("by_name", True) else "in place of"
        lines.append(
            f"{name}: retrieved with {len(pictures)} pictures {beside} its name, which only the "
            "model file holds"
        )
    return lines
