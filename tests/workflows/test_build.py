"""What is generated is what is checked in."""

import pytest
from PIL import Image, ImageChops, ImageStat

from dev.build import decoder_workflows
from dev.build.showcase import pictures_of, pictures_on_server
from dev.build.thumbnails import draw_thumbnail

REMEDY = "run `python -m dev.build.build_workflows`"


@pytest.fixture(scope="module")
def builder(schemas):
    """The program that writes the workflows."""
    from dev.build import build_workflows

    return build_workflows


def alike(path, drawn: Image.Image) -> bool:
    """Whether a picture file shows what was drawn; versions of Pillow may differ in a few edges."""
    kept, drawn = Image.open(path).convert("RGB"), drawn.convert("RGB")
    return kept.size == drawn.size and max(ImageStat.Stat(ImageChops.difference(kept, drawn)).mean) < 4


def test_graphs_are_as_generated(builder):
    for path, text in builder.files(builder.build()).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: {REMEDY}"


def test_thumbnails_show_what_the_miniature_makes(builder, miniature_runs):
    for name, workflow in builder.build().items():
        if name not in decoder_workflows.WORKFLOWS:
            shown = pictures_of(workflow, miniature_runs(name)[1])
            check_thumbnail(builder.OUT / f"{name}.jpg", workflow, shown)


def test_thumbnails_of_the_decoders_workflows_show_what_a_real_host_makes(builder, zimage_server):
    workflows = builder.build()
    for name in decoder_workflows.WORKFLOWS:
        check_thumbnail(
            builder.OUT / f"{name}.jpg", workflows[name], pictures_on_server(zimage_server, workflows[name])
        )


def check_thumbnail(path, workflow, shown) -> None:
    """Whether a thumbnail is what would be drawn of these pictures."""
    assert shown
    assert alike(path, draw_thumbnail(workflow, shown)), f"{path.name}: {REMEDY}"
    assert path.stat().st_size < 60_000


def test_the_gallery_shows_what_the_miniature_makes(schemas):
    from dev.build.build_gallery import OUT, gallery

    assert alike(OUT, gallery()), "run `python -m dev.build.build_gallery`"


def test_help_pictures_are_as_drawn(builder, our_schemas):
    assert set(builder.HELP) == set(our_schemas)
    for path, picture in builder.help_pictures(builder.build()).items():
        assert alike(path, picture), f"{path.name}: {REMEDY}"


def test_every_node_of_ours_is_in_a_workflow_or_only_of_use_with_own_files(builder, our_schemas):
    shown = {box.kind for workflow in builder.build().values() for box in workflow.nodes}
    assert set(our_schemas) - shown == set(builder.UNSHIPPED)
