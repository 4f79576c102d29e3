"""Boxes from the forms that data have them in, and what is no box."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from for_each import for_each
from local_models import SAVED, write_images
from torch.utils.data import DataLoader

from hf_parcor.errors import InputError
from hf_parcor.tasks import TASKS, Encoding, Processed, Rows, load_rows

pytest.importorskip("PIL")
TASK = TASKS["object-detection"]
BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
NUMBERS = {"cat": 0, "dog": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with four images of 12 x 10 pixels."""
    path = tmp_path_factory.mktemp("images")
    write_images(path / "images.csv")
    return path


def examples_of(rows, box_format=None, columns=None):
    names = {number: name for name, number in NUMBERS.items()}
    model = SimpleNamespace(config=SimpleNamespace(label2id=NUMBERS, id2label=names))
    processed = Processed(model, None, Encoding(box_format=box_format))
    return TASK.examples(rows, TASK.find_columns(rows, columns or {}), processed)


def rows_of(folder, entry, class_names=None):
    return Rows(str(folder / "rows.jsonl"), [{"image": "0.png", **entry}], ("image", *entry), class_names or {})


COCO, CORNERS = [[1, 2, 3, 4], [0, 0, 5, 5]], [[1, 2, 4, 6], [0, 0, 5, 5]]
NAMES = ["dog", "cat"]


@for_each(
    ("entry", "box_format"),
    [
        ({"objects": {"bbox": COCO, "category": NAMES}}, None),
        ({"objects": {"id": [7, 8], "bbox": COCO, "category": [1, 0]}}, None),
        ({"objects": [{"bbox": box, "label": name} for box, name in zip(COCO, NAMES, strict=True)]}, None),
        ({"objects.bbox": COCO, "objects.categories": NAMES}, "coco"),
        ({"boxes": CORNERS, "labels": NAMES}, "voc"),
        ({"boxes_xyxy": CORNERS, "label": [1, 0]}, None),
    ],
)
def test_forms_of_boxes(folder, entry, box_format):
    (example,) = examples_of(rows_of(folder, entry), box_format)
    assert [one["bbox"] for one in example["annotations"]] == COCO
    assert [one["category_id"] for one in example["annotations"]] == [1, 0]
    assert [one["area"] for one in example["annotations"]] == [12, 25]
    assert example["image"].size == (12, 10)


@for_each(
    ("entry", "crowds"),
    [
        ({"objects": {"bbox": COCO, "category": NAMES, "iscrowd": [0, 1]}}, [0, 1]),
        ({"objects": [{"bbox": COCO[0], "label": "dog", "iscrowd": True}, {"bbox": COCO[1], "label": "cat"}]}, [1, 0]),
        ({"objects.bbox": COCO, "objects.category": NAMES, "objects.iscrowd": [1.0, 0.0]}, [1, 0]),
        ({"boxes": COCO, "label": NAMES, "is_crowd": [False, True]}, [0, 1]),
        ({"boxes": COCO, "label": NAMES, "iscrowd": None}, [0, 0]),
        ({"boxes": COCO, "label": NAMES}, [0, 0]),
        (
            {"objects": {"bbox": COCO, "category": NAMES, "iscrowd": [0]}},
            r"each of 2 boxes, .* got \[0\] in row 1",
        ),
        ({"boxes": COCO, "label": NAMES, "iscrowd": [0, "no"]}, "expected 0 or 1 for each"),
        ({"boxes": COCO, "label": NAMES, "iscrowd": 1}, "expected 0 or 1 for each"),
    ],
)
def test_crowds(folder, entry, crowds):
    if isinstance(crowds, str):
        with pytest.raises(InputError, match=crowds):
            examples_of(rows_of(folder, entry))
    else:
        (example,) = examples_of(rows_of(folder, entry))
        assert [one["iscrowd"] for one in example["annotations"]] == crowds


class FindsAll(torch.nn.Module):
    """A detector that finds what it is told, and keeps what it is asked to learn."""

    def __init__(self, boxes, labels):
        super().__init__()
        self.boxes, self.told = boxes, labels

    def forward(self, pixel_values, labels=None):
        self.labels = labels
        logits = torch.nn.functional.one_hot(torch.tensor([self.told]), 3) * 9.0
        return SimpleNamespace(loss=torch.tensor(0.0), logits=logits, pred_boxes=torch.tensor([self.boxes]))


@for_each("marked", [True, False])
@for_each("kind", ["YolosImageProcessor", "DetrImageProcessor"])
def test_what_is_found_in_a_crowd_is_no_error_and_nobody_learns_it(marked, kind, folder):
    """A dog in the crowd of dogs, likelier than the dog beside it; without the mark, the crowd is one dog missed."""
    pytest.importorskip("pycocotools")
    one, crowd, in_crowd = [1, 1, 3, 4], [5, 2, 20, 8], [6, 3, 2, 2]  # the crowd reaches over the edge
    rows = rows_of(folder, {"bbox": [one, crowd], "label": ["dog", "dog"], "iscrowd": [0, int(marked)]})
    model = FindsAll([[(x + w / 2) / 12, (y + h / 2) / 10, w / 12, h / 10] for x, y, w, h in (one, in_crowd)], [1, 1])
    processed = Processed(model, getattr(transformers, kind)())
    batches = TASK.batches(examples_of(rows), processed, 1)
    found = TASK.metric("map", processed, batches)(model)
    assert found["map"] == pytest.approx(1.0 if marked else 0.5, abs=0.01)
    (target,) = model.labels
    assert len(target["boxes"]) == len(target["class_labels"]) == 2 - marked
    if marked:
        crowd_at = target["crowd_boxes"] * torch.tensor([12, 10, 12, 10])
        torch.testing.assert_close(crowd_at, torch.tensor([[8.5, 6.0, 7.0, 8.0]]))


def test_names_of_numbered_classes(folder):
    rows = rows_of(folder, {"objects": {"bbox": COCO, "category": [0, 1]}}, {"objects": ["dog", "cat"]})
    assert [one["category_id"] for one in examples_of(rows)[0]["annotations"]] == [1, 0]
    head = TASK.head_settings([(rows, TASK.find_columns(rows, {}))])
    assert head == {"num_labels": 2, "id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}


def test_a_data_set_of_the_hub(folder):
    datasets = pytest.importorskip("datasets")
    from hf_parcor.tasks.rows import _class_names

    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": None}
    for kind in (datasets.ClassLabel(names=["dog", "cat"]), datasets.List(datasets.ClassLabel(names=["dog", "cat"]))):
        features = datasets.Features({"image": datasets.Image(), "objects": {**objects, "category": kind}})
        assert _class_names(features) == {"objects": ["dog", "cat"]}
    entry = {"image": {"path": str(folder / "0.png"), "bytes": None}, "objects": {"bbox": COCO, "category": [0, 1]}}
    data = datasets.Dataset.from_list([entry], features=features)
    rows = Rows("hub", data, tuple(data.column_names), _class_names(data.features))
    assert [one["category_id"] for one in examples_of(rows)[0]["annotations"]] == [1, 0]


def test_an_image_without_boxes(folder):
    (example,) = examples_of(rows_of(folder, {"objects": {"bbox": [], "category": []}}))
    assert example["annotations"] == []


@for_each("kind", ["YolosImageProcessor", "DetrImageProcessor", "RTDetrImageProcessor"])
@for_each("size", [1, 4])
def test_the_true_boxes_are_those_of_the_data_whatever_shares_a_batch(kind, size, tmp_path):
    """Processors that pad images make boxes shares of what is padded, and a model's are shares of its image."""
    from PIL import Image

    boxes = [[[2, 3, 10, 8], [0, 0, 4, 20]], [[5, 20, 10, 15]], [], [[20, 5, 20, 10]], [[0, 0, 30, 30]]]
    for place, shape in enumerate([(40, 20), (20, 40), (40, 20), (40, 20), (30, 30)]):
        Image.new("RGB", shape).save(tmp_path / f"{place}.png")
    entries = [
        {"image": f"{place}.png", "bbox": of_image, "label": [0] * len(of_image)}
        for place, of_image in enumerate(boxes)
    ]
    examples = examples_of(Rows(str(tmp_path / "rows.jsonl"), entries, ("image", "bbox", "label")))
    shape = {"size": {"shortest_edge": 32, "longest_edge": 64}} if kind[0] in "YD" else {}
    model = SimpleNamespace(forward=lambda pixel_values: None)
    processed = Processed(model, getattr(transformers, kind)(**shape))
    found = {}
    for batch in TASK.batches(examples, processed, size):
        assert len(batch["labels"]) == len(batch["pixel_values"]) <= size
        for target in batch["labels"]:
            height, width = target["orig_size"].tolist()
            pixels = target["boxes"].double() * torch.tensor([width, height, width, height])
            pixels[:, :2] -= pixels[:, 2:] / 2
            found[int(target["image_id"])] = pixels.tolist()
    assert [found[place] for place in range(len(boxes))] == [
        [pytest.approx(box, abs=1e-4) for box in of_image] for of_image in boxes
    ]


@for_each("objects", [{"bbox": [], "category": []}, {"bbox": COCO, "category": NAMES, "iscrowd": [1, 1]}])
def test_data_without_any_box_but_for_crowds_are_not_measured_on(folder, objects):
    examples = examples_of(rows_of(folder, {"objects": objects}))
    processed = Processed(SimpleNamespace(forward=lambda pixel_values: None), None)
    of_task = TASK.batches(examples, processed, 1)
    for batches in (DataLoader(examples), of_task):
        with pytest.raises(InputError, match="a box on one image at least, got none on 1"):
            TASK.metric("map", processed, batches)


def test_a_class_that_never_occurs_is_learned_where_the_data_name_it(folder):
    rows = rows_of(folder, {"bbox": COCO, "label": [1, 1]}, {"label": ["dog", "cat", "cow"]})
    assert TASK.head_settings([(rows, TASK.find_columns(rows, {}))])["num_labels"] == 3


@for_each(
    ("boxes", "labels", "says"),
    [
        ([[3, 3, 0, 4]], ["dog"], "width > 0 and height > 0, got .* in row 1; leave such boxes out"),
        ([[3, 3, 2, -1]], ["dog"], "width > 0 and height > 0"),
        ([[1, 2, 3]], ["dog"], r"four numbers for a box, got \[1, 2, 3\] in row 1"),
        ([[1, 2, 3, float("nan")]], ["dog"], "four numbers"),
        ([[1, 2, 3, None]], ["dog"], "four numbers"),
        ([5], ["dog"], "four numbers"),
        ([[1, 2, 3, 4]], ["dog", "cat"], "as many classes as boxes, got 2 and 1 in row 1"),
        ([[1, 2, 3, 4]], ["cow"], "expected a label of the model"),
        (None, [], "expected a list with an entry for each object"),
    ],
)
def test_what_is_no_box(folder, boxes, labels, says):
    with pytest.raises(InputError, match=says):
        examples_of(rows_of(folder, {"bbox": boxes, "label": labels}))


@for_each("box", [[12, 0, 3, 3], [0, 10, 3, 3], [-4, 0, 4, 4], [0, -4, 4, 4], [100, 100, 5, 5]])
def test_a_box_outside_of_its_image(folder, box):
    examples = examples_of(rows_of(folder, {"bbox": [box], "label": ["dog"]}))
    with pytest.raises(InputError, match=r"expected a box on the image of 12 x 10 pixels, got .* in row 1"):
        examples[0]


@for_each("box", [[11, 9, 3, 3], [-2, -2, 3, 3], [1, 2, 1, 1], [1, 2, 0.5, 0.5]])
def test_a_box_that_is_small_or_reaches_over_the_edge_stays_as_it_is(folder, box):
    (example,) = examples_of(rows_of(folder, {"bbox": [box], "label": ["dog"]}))
    assert example["annotations"][0]["bbox"] == box


def test_corners_taken_for_sizes_are_noticed_the_other_way_round(folder):
    with pytest.raises(InputError, match=r"xmax > xmin .*say with the box format"):
        examples_of(rows_of(folder, {"bbox": [[5, 5, 3, 3]], "label": ["dog"]}), "voc")
    with pytest.raises(InputError, match="expected coco or voc, got 'yolo'"):
        examples_of(rows_of(folder, {"bbox": COCO, "label": NAMES}), "yolo")


def packed(folder, **arrays):
    images = [(folder / f"{index}.png").read_bytes() for index in range(2)]
    joined = np.frombuffer(b"".join(images), np.uint8)
    held = {"jpeg": joined, "offsets": np.cumsum([0, *map(len, images)]), **arrays}
    path = folder / "pack.npz"
    np.savez(path, **{name: value for name, value in held.items() if value is not None})
    return str(path)


class TestPacks:
    boxes = np.array([[1, 1, 2, 4, 6], [0, 0, 0, 5, 5], [1, 2, 2, 9, 9]], np.float32)

    def test_boxes(self, folder):
        names = np.array(["cat", "dog"])
        rows = load_rows(packed(folder, boxes_xyxy=self.boxes, box_offsets=np.array([0, 2, 3]), names=names))
        first, second = examples_of(rows)
        assert [one["bbox"] for one in first["annotations"]] == COCO
        assert [one["category_id"] for one in second["annotations"]] == [1]
        assert second["image"].tobytes() == rows.image("image", 1).tobytes() != first["image"].tobytes()
        assert rows.data.rows == 2

    def test_an_image_without_boxes(self, folder):
        rows = load_rows(packed(folder, boxes_xyxy=self.boxes[:2], box_offsets=np.array([0, 0, 2])))
        assert [len(example["annotations"]) for example in examples_of(rows)] == [0, 2]
        assert (rows.columns, rows.class_names) == (("image", "boxes_xyxy", "label"), {})

    @for_each(
        ("arrays", "says"),
        [
            ({"box_offsets": None}, "box_offsets beside boxes_xyxy"),
            ({"box_offsets": np.array([0, 3])}, "more than images, got 2 for 2"),
            ({"box_offsets": np.array([0, 2, 4])}, "the number of boxes, 3, got 0 to 4"),
            ({"box_offsets": np.array([0, 3, 2])}, "fall.*got 3 and then 2 at 1"),
            ({"box_offsets": np.array([0.0, 2, 3])}, "whole numbers"),
            ({"boxes_xyxy": boxes[:, 1:]}, r"five a box, got float32 of shape \(3, 4\)"),
            ({"boxes_xyxy": boxes + 0.5}, "whole numbers of classes.*got 1.5 of box 0"),
            ({"boxes_xyxy": boxes * np.nan}, "whole numbers of classes.*got nan of box 0"),
            ({"names": np.array(["cat"])}, "below 1.*got 1 of box 0"),
            ({"boxes_xyxy": None}, "labels, or boxes_xyxy"),
            ({"jpeg": None}, "'jpeg' it is no pack"),
        ],
    )
    def test_what_is_no_pack(self, folder, arrays, says):
        whole = {"boxes_xyxy": self.boxes, "box_offsets": np.array([0, 2, 3]), "names": np.array(["cat", "dog"])}
        with pytest.raises(InputError, match=says):
            load_rows(packed(folder, **{**whole, **arrays}))

    @pytest.mark.skipif(not BCCD.is_dir(), reason="the blood cells are not here")
    def test_blood_cells(self):
        rows = load_rows(str(BCCD / "bccd_test.npz"))
        head = TASK.head_settings([(rows, TASK.find_columns(rows, {}))])
        assert (len(rows.entries), list(head["label2id"])) == (72, ["RBC", "WBC", "Platelets"])
        assert sum(len(row["label"]) for row in rows.entries) == 945


@pytest.mark.slow
def test_a_batch_is_what_the_image_processor_makes(tmp_path):
    save_model, write_data, file = SAVED["object-detection"]
    folder, data = save_model(tmp_path / "model"), write_data(tmp_path / file)
    rows = load_rows(data)
    processed = Processed(TASK.load_model(folder), TASK.load_processor(folder))
    examples = TASK.examples(rows, TASK.find_columns(rows, {}), processed)
    batch = TASK.collator(processed)([examples[index] for index in range(4)])
    assert set(batch) == {"pixel_values", "labels"}
    assert [len(target["boxes"]) for target in batch["labels"]] == [2, 0, 1, 1]
    cut = batch["labels"][3]["boxes"][0].tolist()  # x from 2 to the edge, at 12
    assert cut == pytest.approx([7 / 12, 4 / 10, 10 / 12, 4 / 10])
