"""Class vectors from the text tower of a two-tower model, and readable names for classes."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_model
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from safetensors.torch import load_file
from test_pretrained import by_two_processes, write_images
from test_streams import write_shards
from test_surviving import assert_same_run, interrupted_at
from test_training import train
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer

from data.class_names import name_classes, names_of, with_names
from modeling_ride_bf import RideBfForImageClassification
from ride_bf import classify, evaluate, publish
from ride_bf.recipes import RECIPES
from ride_bf.runs.models import load_model
from ride_bf.runs.provenance import load_data_to_evaluate, load_splits_of, read_data
from ride_bf.training import text_start
from ride_bf.training.backbone import load_backbone
from ride_bf.training.heads import set_class_vectors
from ride_bf.training.text_start import check_names_are_words, text_class_vectors

TOWER = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**TOWER, "hidden_size": 16, "image_size": 16, "patch_size": 8}
TEXT = {**TOWER, "hidden_size": 12, "max_position_embeddings": 40}
READABLE = {"n01440764": "tench", "n02084071": "great_dane", "n03126707": "crane"}
NAMES = list(READABLE.values())
COUNTS = dict(zip(READABLE, (9, 5, 2), strict=True))
PROMPT = ("a photo of a {}.",)


def letters():
    """A vocabulary of single letters, in the middle and at the end of a word."""
    marks = ["<|startoftext|>", "<|endoftext|>"]
    return {
        token: index
        for index, token in enumerate(
            [*marks, *(c + end for c in "abcdefghijklmnopqrstuvwxyz.0123456789" for end in ("", "</w>"))]
        )
    }


def clip_tokenizer():
    return transformers.CLIPTokenizer(vocab=letters(), merges=[])


def siglip_tokenizer():
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz. "])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids"], padding_side="right", **marks
    )


def write_two_towers(folder, kind):
    """A small random model with the tokenizer and the image processor of its kind."""
    torch.manual_seed(0)
    if kind == "clip":
        text = {**TEXT, "vocab_size": len(letters()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        tokenizer = clip_tokenizer()
    else:
        tokenizer = siglip_tokenizer()
        text = {**TEXT, "hidden_size": 16, "vocab_size": len(tokenizer), "projection_size": 16}
        text |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        of = transformers.SiglipConfig if kind == "siglip" else transformers.Siglip2Config
        vision = VISION if kind == "siglip" else {**VISION, "num_patches": 4}
        config = of(text_config=text, vision_config=vision)
        processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    model = AutoModel.from_config(config)
    for parameter in model.parameters():  # their own initialisation makes nearly equal features
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_two_towers(tmp_path_factory.mktemp("towers") / "tiny-clip", "clip")


@pytest.fixture(scope="module", params=["siglip", "siglip2"])
def siglip(tmp_path_factory, request):
    return write_two_towers(tmp_path_factory.mktemp("towers") / f"tiny-{request.param}", request.param)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images in folders with WordNet ids."""
    return write_images(tmp_path_factory.mktemp("images"), COUNTS)


@pytest.fixture(scope="module")
def names_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "names.json"
    path.write_text(json.dumps(READABLE))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def lift(output_dir, backbone, images, *options):
    given = ("--recipe", "lift_clip_vit_b16", "--backbone", backbone, "--dataset", "custom", "--data_dir", images)
    small = ("--epochs", 2, "--batch_size", 8, "--report_to", "none")
    return train(output_dir, *given, *small, *options)


# --- The vectors ------------------------------------------------------------------------------------------------------


def classifier(place, **options):
    """One cosine head on the vision tower, which starts from text."""
    backbone = load_backbone(str(place))
    network = {**RECIPES["lift_clip_vit_b16"].network, "num_labels": 3, "backbone_config": backbone.config}
    config = tiny_model().config.__class__(**{**network, **options})
    model = RideBfForImageClassification.from_backbone(backbone.model, config).eval()
    set_class_vectors(model, text_class_vectors(str(place), NAMES, PROMPT))
    return model


@torch.no_grad()
def zero_shot(place, pixels):
    """Cosines (B, C) of transformers' own zero-shot classification, and the features of images before projection."""
    model, tokenizer = AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    padding = {"padding": True} if model.config.model_type == "clip" else {"padding": "max_length", "max_length": 40}
    texts = ["a photo of a tench.", "a photo of a great dane.", "a photo of a crane."]
    tokens = tokenizer(texts, return_tensors="pt", **padding)
    outputs = model(**tokens, pixel_values=pixels)
    return outputs.image_embeds @ outputs.text_embeds.T, outputs


@torch.no_grad()
def test_clip_against_its_zero_shot_classification(clip):
    """cos(v, W^T t) = cos(W v, t) |W v| / (|v| |W^T t|), image by image and class by class."""
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model, theirs = classifier(clip), AutoModel.from_pretrained(clip).eval()
    cosines, outputs = zero_shot(clip, pixels)
    ours = model(pixels).logits / 25
    pooled = theirs.vision_model(pixels).pooler_output  # (B, D)
    projected = theirs.get_image_features(pixels).pooler_output  # (B, P)
    by_image = projected.norm(dim=1, keepdim=True) / pooled.norm(dim=1, keepdim=True)
    by_class = (outputs.text_embeds @ theirs.visual_projection.weight).norm(dim=1)  # (C,)
    torch.testing.assert_close(ours, cosines * by_image / by_class, rtol=1e-4, atol=1e-5)
    assert cosines.std(dim=1).min() > 1e-3, "the classes differ by far more than the tolerance"


@torch.no_grad()
def test_an_orthonormal_projection_keeps_the_order_of_zero_shot_classification(clip, tmp_path):
    model = AutoModel.from_pretrained(clip)
    model.visual_projection.weight.copy_(torch.linalg.qr(model.visual_projection.weight.T)[0].T)
    shutil.copytree(clip, tmp_path / "clip")
    model.save_pretrained(tmp_path / "clip")
    pixels = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    cosines, _ = zero_shot(tmp_path / "clip", pixels)
    assert torch.equal(classifier(tmp_path / "clip")(pixels).logits.argsort(dim=1), cosines.argsort(dim=1))


@torch.no_grad()
def test_siglip_is_its_zero_shot_classification(siglip):
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = classifier(siglip)
    if "siglip2" in siglip.name:  # it takes patches
        patches = pixels.unflatten(3, (2, 8)).unflatten(2, (2, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes, mask = torch.tensor([[2, 2]] * 6), torch.ones(6, 4, dtype=torch.long)
        theirs = AutoModel.from_pretrained(siglip).eval()
        images = theirs.get_image_features(patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output
        tokens = AutoTokenizer.from_pretrained(siglip)(
            [f"a photo of a {name.replace('_', ' ')}." for name in NAMES],
            padding="max_length",
            max_length=40,
            return_tensors="pt",
        )
        texts = theirs.get_text_features(**tokens).pooler_output
        cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    else:
        cosines, _ = zero_shot(siglip, pixels)
    torch.testing.assert_close(model(pixels).logits / 25, cosines, rtol=1e-4, atol=1e-5)
    assert cosines.std(dim=1).min() > 1e-3, "the classes differ by far more than the tolerance"


def test_several_prompts_are_averaged(siglip):
    first, second = "a photo of a {}.", "the {}"
    one, other = (text_class_vectors(str(siglip), NAMES, [prompt]) for prompt in (first, second))
    both = text_class_vectors(str(siglip), NAMES, [first, second])
    torch.testing.assert_close(both, F.normalize(one + other, dim=1))
    assert (one - other).abs().max() > 0.01


def test_texts_go_through_in_parts(clip, monkeypatch):
    whole = text_class_vectors(str(clip), NAMES, PROMPT)
    monkeypatch.setattr(text_start, "_TEXTS_AT_ONCE", 2)
    torch.testing.assert_close(text_class_vectors(str(clip), NAMES, PROMPT), whole)


def test_every_expert_starts_from_the_text(clip, images, names_file, tmp_path, monkeypatch):
    """With blocks and adapters of its own too. The text tower is dropped, and the backbone stays as it was."""
    options = ("--class_names", names_file, "--num_experts", 2, "--num_expert_layers", 1, "--expert_adapter_size", 4)
    still = ("--learning_rate", 1e-30, "--weight_decay", 0, "--epochs", 1)
    out = lift(tmp_path / "out", clip, images, *options, *still)
    saved, vectors = load_model(out / "last"), text_class_vectors(str(clip), NAMES, PROMPT)
    for head in saved.classifiers:
        torch.testing.assert_close(head.weight.detach(), vectors)
    assert not [name for name in load_file(out / "last/model.safetensors") if "text" in name or "projection" in name]


# --- What cannot start from text --------------------------------------------------------------------------------------


def error_of(place, names=NAMES, prompts=PROMPT):
    with pytest.raises(ValueError, match=r"\w") as error:
        text_class_vectors(str(place), names, prompts)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_without_a_text_tower(clip, tmp_path):
    AutoModel.from_pretrained(clip).vision_model.save_pretrained(tmp_path / "vision")
    message = error_of(tmp_path / "vision")
    assert "a clip_vision_model model, has no text tower that fits its features; name a whole model" in message
    assert "or set --classifier_init class_means" in message
    vit = transformers.ViTConfig(**VISION)
    AutoModel.from_config(vit).save_pretrained(tmp_path / "vit")
    assert "a vit model, has no text tower" in error_of(tmp_path / "vit")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_without_a_tokenizer(kind, tmp_path):
    """Of CLIP's, transformers makes one that knows no word."""
    folder = write_two_towers(tmp_path / kind, kind)
    for path in folder.glob("*token*"):
        path.unlink()
    assert error_of(folder).endswith("has no tokenizer: save one beside it, or set --classifier_init class_means")


def test_a_tokenizer_that_needs_a_package(clip, monkeypatch):
    def needs(*_, **__):
        raise ImportError("SiglipTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs)
    assert error_of(clip) == f"the tokenizer of {clip} needs sentencepiece: pip install sentencepiece"


def test_texts_that_do_not_fit(clip, tmp_path):
    assert "takes 40 tokens, and 'a photo of a rarerare" in error_of(clip, ["tench", "rare" * 9])
    shutil.copytree(clip, tmp_path / "clip")
    more = {**letters(), **{f"{c}</w>": 900 + ord(c) for c in "abc"}}
    transformers.CLIPTokenizer(vocab=more, merges=[]).save_pretrained(tmp_path / "clip")
    assert "it is of another model; save the right one beside it" in error_of(tmp_path / "clip")
    transformers.CLIPTokenizer(merges=[]).save_pretrained(tmp_path / "clip")  # it knows no word
    assert "has 2 tokens, and its text tower" in error_of(tmp_path / "clip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backbone_pooling", "auto"), "is backbone_pooling auto: set --backbone_pooling pooler"),
        (("--standardise_features", "true"), "set --standardise_features false"),
        (("--classifier", "linear"), "set --classifier cosine"),
        (("--prompt", "a photo"), "prompt 'a photo' is the same for every class"),
        (("--backbone", "none"), "name one with --backbone, such as openai/clip-vit-base-patch16"),
    ],
)
def test_options_that_do_not_go_with_text(options, message, tmp_path, clip, images, capsys):
    with pytest.raises(SystemExit):
        lift(tmp_path / "out", clip, images, *options)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_that_cannot_start_writes_nothing(tmp_path, clip, images, names_file):
    with pytest.raises(SystemExit, match=r"not n01440764, n02084071, n03126707; give them in a file with --class_nam"):
        lift(tmp_path / "out", clip, images)
    with pytest.raises(SystemExit, match="classifier_init text would replace the class vectors of --init_from"):
        lift(tmp_path / "out", clip, images, "--init_from", "x", "--classifier_init", "text")
    with pytest.raises(SystemExit, match="shorten --prompt"):
        lift(tmp_path / "out", clip, images, "--class_names", names_file, "--prompt", "long " * 20 + "{}")
    with pytest.raises(SystemExit, match=r"there is no file nowhere\.txt with the names of the classes"):
        lift(tmp_path / "out", clip, images, "--class_names", "nowhere.txt")
    assert not (tmp_path / "out").exists()


def test_names_that_say_nothing():
    check_names_are_words(["tench", "747 jet", "猫", "x", "bus_station/indoor"])
    for code in ("7", "n01440764", "Actinopterygii/2229"):
        with pytest.raises(ValueError, match=f"not {code}; give them in a file with --class_names"):
            check_names_are_words(["tench", code])


# --- Names of classes -------------------------------------------------------------------------------------------------


def splits_of(names, folders=None):
    """Splits of a picture a class, in these folders if they are given."""
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    paths = [f"/data/train/{folder}/1.png" for folder in folders or ["all"] * len(names)]
    rows = {"image": [{"path": path, "bytes": b""} for path in paths], "label": list(range(len(names)))}
    return DatasetDict({split: Dataset.from_dict(rows, features=features) for split in ("train", "test")})


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "tench\ngreat_dane\ncrane\n"),
        ("names.json", '{"zebra": "crane", "ant": "tench", "bee": "great_dane"}'),
        ("names.json", '{"n3": "crane", "n2": "great_dane", "n1": "tench"}'),
        ("names.json", '{"2": "crane", "0": "tench", "1": "great_dane"}'),
        ("names.csv", "class,name\nbee,great_dane\nant,tench\nzebra,crane\n"),
        ("names.CSV", '\ufeffn1,"tench"\r\nn3,crane\r\nn2, great_dane\r\n\r\n'),
        ("names.tsv", "0\ttench\n2\tcrane\n1\tgreat_dane\n"),
    ],
)
def test_files_with_names(tmp_path, file, content):
    (tmp_path / file).write_text(content, encoding="utf-8")
    splits = splits_of(["ant", "bee", "zebra"], ["n1", "n2", "n3"])
    named, before = name_classes(splits, tmp_path / file)
    assert before == ["ant", "bee", "zebra"]
    assert [named[split].features["label"].names for split in named] == [NAMES, NAMES]
    assert named["train"].with_format("arrow")["label"].to_pylist() == [0, 1, 2]
    assert names_of(splits) == before, "the splits that were given stay"


def test_names_of_the_data_go_before_labels(tmp_path):
    (tmp_path / "names.json").write_text('{"0": "zero", "1": "one"}')
    named, _ = name_classes(splits_of(["1", "0"]), tmp_path / "names.json")
    assert names_of(named) == ["one", "zero"]


def test_new_names_copy_no_images(tmp_path):
    Dataset.from_dict({"label": [0, 1, 2]}, Features({"label": ClassLabel(names=list("abc"))})).save_to_disk(tmp_path)
    train = Dataset.load_from_disk(str(tmp_path)).select([2, 0])
    named = with_names(DatasetDict({"train": train}), ["x", "y", "z"])["train"]
    assert named.cache_files == train.cache_files != []
    assert named.features["label"].names == ["x", "y", "z"]
    assert named["label"][:] == [2, 0]
    assert named._fingerprint != train._fingerprint, "what is computed from the rows must not be taken from the others"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("names.txt", "tench\ncrane\n", r"has 2 names for 3 classes, none for zebra; give each class a line"),
        ("names.txt", "a\nb\nc\nd\n", r"has 4 names for 3 classes, too many, from 'd' on"),
        ("names.txt", "tench\ncrane\ntench\n", "the name 'tench' of line 1, again"),
        (
            "names.txt",
            "n1 tench\nn2 dane\nn3 crane\n",
            r"starts with a class of the data, such as 'n1 tench'; .* \.csv",
        ),
        ("names.json", '{"ant": "a", "bee": "b"}', "has no name for zebra"),
        ("names.json", '{"ant": "a", "bee": "b", "zebra": " "}', "has no name for zebra"),
        ("names.json", '{"ant": "a", "bee": "b", "zebra": "z", "yak": "y"}', "names yak, which the data do not have"),
        ("names.json", '{"ant": "a", "bee": "a", "zebra": "z"}', "gives several classes the name a;"),
        ("names.json", '{"ant": "a", "bee": "b", "bee": "c", "zebra": "z"}', "names bee several times"),
        ("names.json", '{"ant": "a", "bee": 3}', "must be an object with a name for each class"),
        ("names.json", '["ant"]', "must be an object with a name for each class"),
        ("names.json", "{", "is not valid JSON"),
        ("names.csv", "wnid,name\nant,a\nbee,b\nzebra,z\n", "names wnid, .* A heading must be class,name"),
        (
            "names.csv",
            "ant,tench, fish\n",
            "must have two columns, a class and its name, but a row is 'ant,tench,fish'",
        ),
    ],
)
def test_files_that_are_wrong(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        name_classes(splits_of(["ant", "bee", "zebra"], ["n1", "n2", "n3"]), tmp_path / file)
    assert str(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)


# --- A run from start to end ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clip, images, names_file):
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(names_file, folder / "names.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        out = lift(folder / "out", clip, images, "--class_names", folder / "names.json")
    (folder / "names.json").unlink()  # what comes after knows the names
    return out


def test_the_checkpoint_knows_both_names(trained):
    data = read_data(trained)
    assert (data.class_names, data.names_in_data) == (NAMES, list(READABLE))
    assert "class_names" not in data.options
    assert load_model(trained).config.id2label == dict(enumerate(NAMES))
    assert json.loads((trained / "test_results.json").read_text())["class_names"] == NAMES
    splits, again = load_splits_of(trained)
    assert (names_of(splits), again) == (NAMES, data)


def test_what_comes_after_uses_the_readable_names(trained, images, tmp_path, capsys):
    evaluate.main(["--model", str(trained), "--output_dir", str(tmp_path / "measured")])
    results = json.loads((tmp_path / "measured/results.json").read_text())
    assert (results["class_names"], results["train_class_counts"]) == (NAMES, list(COUNTS.values()))
    assert results["metrics"]["accuracy"] == json.loads((trained / "test_results.json").read_text())["test"]["accuracy"]
    assert "great_dane" in capsys.readouterr().out
    classify.main([str(trained), str(images / "test/n01440764/0.png")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    publish.main([str(trained), "--repo_id", "a/b", "--dry_run", "--output_dir", str(tmp_path / "page")])
    card = (tmp_path / "page/README.md").read_text()
    assert "great_dane" in card
    assert "n01440764" not in card
    assert "What the papers report" not in card, "LIFT trains more than this recipe"
    for path in (tmp_path / "page").rglob("*.json"):
        assert str(trained.parent) not in path.read_text(), path
    assert json.loads((tmp_path / "page/checkpoint.json").read_text())["data"]["names_in_data"] == list(READABLE)


def test_other_images_have_the_names_of_the_data_or_the_readable_ones(trained, images, tmp_path):
    shutil.copytree(images, tmp_path / "readable")
    for split in ("train", "val", "test"):
        for code, name in READABLE.items():
            (tmp_path / "readable" / split / code).rename(tmp_path / "readable" / split / f"{name}.")
            (tmp_path / "readable" / split / f"{name}.").rename(tmp_path / "readable" / split / name)
    shutil.copytree(images, tmp_path / "codes")
    data = load_data_to_evaluate(trained, other_images=True, data_dir=tmp_path / "codes")
    assert data.class_names == data.split.features["label"].names == NAMES
    with pytest.raises(ValueError, match="was trained on other classes"):  # their order is that of their names
        load_data_to_evaluate(trained, other_images=True, data_dir=tmp_path / "readable")
    shutil.move(tmp_path / "codes/train/n03126707", tmp_path / "codes/train/n99999999")
    shutil.move(tmp_path / "codes/val/n03126707", tmp_path / "codes/val/n99999999")
    shutil.move(tmp_path / "codes/test/n03126707", tmp_path / "codes/test/n99999999")
    with pytest.raises(ValueError, match=r"the first that differ: \[\('crane', 'n99999999'\)\]"):
        load_data_to_evaluate(trained, other_images=True, data_dir=tmp_path / "codes")


def test_a_resumed_run_never_reads_the_text_tower(clip, images, names_file, tmp_path, monkeypatch):
    place = shutil.copytree(clip, tmp_path / "tiny-clip")
    options = ("--class_names", names_file, "--epochs", 3)
    whole = lift(tmp_path / "whole", place, images, *options)
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        with pytest.raises(SystemExit):
            lift(tmp_path / "out", place, images, *options)
    for path in place.glob("*token*"):
        path.unlink()
    with pytest.raises(SystemExit, match="has no tokenizer"):
        lift(tmp_path / "new", place, images, *options)
    lift(tmp_path / "out", place, images, *options, "--resume")
    assert_same_run(tmp_path / "out", whole)


def test_two_processes_start_from_the_same_text(clip, images, names_file, tmp_path):
    """16 training images in batches of 16, so that none has to be repeated."""
    given = ("--recipe", "lift_clip_vit_b16", "--backbone", clip, "--dataset", "custom", "--data_dir", images)
    given += ("--epochs", 2, "--batch_size", 16, "--augmentation", "none", "--class_names", names_file)
    by_two_processes(tmp_path, *given, "--report_to", "none")
    lift(tmp_path / "one", clip, images, *given[8:])
    left, right = (load_file(tmp_path / name / "last/model.safetensors") for name in ("one", "two"))
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-6, msg=key)


def test_other_names_are_another_run(clip, images, names_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_at(2, patch)
        own = shutil.copy(names_file, tmp_path / "names.json")
        with pytest.raises(SystemExit):
            lift(tmp_path / "out", clip, images, "--class_names", own)
    (tmp_path / "names.json").write_text(json.dumps({**READABLE, "n01440764": "carp"}))
    with pytest.raises(SystemExit, match=r"the first that differ: \[\('tench', 'carp'\)\]"):
        lift(tmp_path / "out", clip, images, "--class_names", own, "--resume")


def test_a_dry_run_says_what_the_text_is(clip, images, names_file, tmp_path, capsys):
    prompts = ("--prompt", "a photo of a {}.", "the {}")
    lift(tmp_path / "out", clip, images, "--class_names", names_file, *prompts, "--dry_run")
    said = "The class vectors start from text, the first one from 'a photo of a tench.', 'the tench'"
    assert said in capsys.readouterr().out


def test_a_stream_starts_from_text(clip, tmp_path):
    """It does not need the features of the training images."""
    write_shards(tmp_path / "shards", label=lambda c: f"n{c}")
    (tmp_path / "names.csv").write_text("n0,tench\nn1,great_dane\nn2,crane\n")
    options = ("--streaming", "--class_names", tmp_path / "names.csv", "--epochs", 1)
    out = lift(tmp_path / "out", clip, tmp_path / "shards", *options)
    assert read_data(out).names_in_data == ["n0", "n1", "n2"]
    splits, _ = load_splits_of(out)
    assert names_of(splits) == NAMES
