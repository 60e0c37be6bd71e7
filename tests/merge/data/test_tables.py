"""Tables as people write them: other delimiters and encodings, paths of Windows, captions, WILDS' metadata.csv."""

from pathlib import Path

import pytest

from clipmerge.data.open import open_split
from clipmerge.errors import DataError

from .conftest import MakeFolder, encoded, picture


def put(root: Path, *places: str) -> None:
    for i, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        picture(i, 8, 6).save(root / place)


@pytest.mark.parametrize("comma", [",", ";", "\t", "|", ", ", " ; "])
@pytest.mark.parametrize("header", [True, False])
def test_columns_stand_apart_by_what_fits(comma: str, header: bool, folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    rows = [
        comma.join(row) for row in (("path", "label"), ("cat/0.jpg", "big cat"), ("dog/0.jpg", "dog, small"))
    ]
    rows[2] = (
        rows[2].replace("dog, small", '"dog, small"')
        if comma == ","
        else rows[2].replace("dog, small", "dog")
    )
    (root / "t.csv").write_text("\n".join(rows[not header :]))
    split = open_split(root / "t.csv")
    assert split.names == ("cat/0.jpg", "dog/0.jpg")
    assert split.classes == ("big cat", "dog, small" if comma == "," else "dog")


def test_excels_own_first_line(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    (root / "t.csv").write_bytes(b"sep=;\r\npath;label\r\ncat/0.jpg;cat\r\ndog/0.jpg;dog\r\ndog/9.jpg;\r\n")
    with pytest.raises(DataError, match="line 5: no label"):
        open_split(root / "t.csv")
    assert open_split(root / "t.csv", skip_bad=True).classes == ("cat", "dog")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_latin_1_is_read_and_said(encoding: str, folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    (root / "t.csv").write_bytes("path;label\ncat/0.jpg;Dogge für Käfer\ndog/0.jpg;façade\n".encode(encoding))
    split = open_split(root / "t.csv")
    assert split.classes == ("Dogge für Käfer", "façade")
    assert split.remarks == ("it is not UTF-8, so it was read as Latin-1",)
    (root / "t.csv").write_text("path,label\ncat/0.jpg,façade\ndog/0.jpg,x\n", encoding="utf-8-sig")
    assert open_split(root / "t.csv").remarks == ()


def test_paths_of_windows(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    (root / "t.csv").write_text("path,label\ncat\\0.jpg,cat\n.\\dog\\0.jpg,dog\n")
    split = open_split(root / "t.csv")
    assert split.names == ("cat/0.jpg", "dog/0.jpg")
    assert split.read_bytes(1) == (root / "dog" / "0.jpg").read_bytes()


def test_whole_paths_of_windows_are_found_beside_the_table(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    lines = [f"D:\\me\\data\\{c}\\0.jpg,{c}" for c in ("cat", "dog")]
    (root / "t.csv").write_text("\n".join(["path,label", *lines]))
    split = open_split(root / "t.csv")
    assert split.names == ("cat/0.jpg", "dog/0.jpg")
    assert split.remarks == ("what lay in D:\\me\\data was found beside it",)
    (root / "t.csv").write_text("path,label\nD:\\a\\nowhere.jpg,cat\nD:\\a\\other.jpg,dog\n")
    with pytest.raises(DataError, match="no such file"):
        open_split(root / "t.csv")


def test_two_columns_that_could_be_one_of_ours(folder: MakeFolder) -> None:
    """A word beside a number is its name; beside words it is something else."""
    root = folder(cat=1, dog=1)
    (root / "t.csv").write_text("filename,class,label\ncat/0.jpg,a cat,1\ndog/0.jpg,a dog,0\n")
    split = open_split(root / "t.csv")
    assert (split.classes, split.labels.tolist()) == (("a dog", "a cat"), [1, 0])
    (root / "t.csv").write_text("filename,category,label\ncat/0.jpg,animal,cat\ndog/0.jpg,animal,dog\n")
    assert open_split(root / "t.csv").classes == ("cat", "dog")


def test_parts_that_are_numbers(folder: MakeFolder) -> None:
    root = folder(cat=3, dog=3)
    lines = [f"{c}/{i}.jpg,{c},{i}" for c in ("cat", "dog") for i in range(3)]
    (root / "t.csv").write_text("\n".join(["path,label,split", *lines]))
    assert open_split(root / "t.csv", role="val").names == ("cat/1.jpg", "dog/1.jpg")
    assert open_split(root / "t.csv").part == "test"


@pytest.mark.parametrize(
    "text",
    [
        "image,caption\ncat/0.jpg,one\ncat/0.jpg,two\ndog/0.jpg,three\n",
        "image,caption_0,caption_1\ncat/0.jpg,one,two\ndog/0.jpg,three,\n",
        "image_name| comment_number| comment\ncat/0.jpg| 0| one\ncat/0.jpg| 1| two\ndog/0.jpg| 0| three\n",
    ],
)
def test_several_captions_of_an_image(text: str, folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    (root / "t.csv").write_text(text)
    split = open_split(root / "t.csv")
    assert split.captions == ("one", "two", "three")
    assert (split.pictures, split.index.tolist()) == (2, [0, 0, 1])
    assert split.names == ("cat/0.jpg", "cat/0.jpg (2)", "dog/0.jpg")
    assert split.remarks == ()


# --- WILDS


def test_waterbirds(tmp_path: Path) -> None:
    rows = [("a/0.jpg", 0, 2, 0), ("a/1.jpg", 1, 2, 0), ("b/2.jpg", 1, 2, 1), ("b/3.jpg", 0, 0, 1)]
    put(tmp_path, *(row[0] for row in rows))
    head = "img_id,img_filename,y,split,place,place_filename\n"
    lines = (
        f"{i},{path},{y},{part},{place},/x/{i}.jpg\n" for i, (path, y, part, place) in enumerate(rows, 1)
    )
    (tmp_path / "metadata.csv").write_text(head + "".join(lines))
    for source in (tmp_path, tmp_path / "metadata.csv"):
        split = open_split(source)
        assert split.classes == ("landbird", "waterbird")
        assert split.labels.tolist() == [0, 1, 1]
        assert split.group_names == (
            "landbird on land",
            "landbird on water",
            "waterbird on land",
            "waterbird on water",
        )
        assert split.groups is not None
        assert split.groups.tolist() == [0, 2, 3]
        assert split.remarks[-1] == "read as Waterbirds of WILDS"
    assert open_split(tmp_path, role="train").names == ("b/3.jpg",)


def test_iwildcam(tmp_path: Path) -> None:
    put(tmp_path, "train/a.jpg", "train/b.jpg", "train/c.jpg")
    (tmp_path / "metadata.csv").write_text(
        ",location_remapped,sequence_remapped,y,filename,image_id,datetime,split\n"
        "0,7,1,12,a.jpg,a,2013,test\n1,12,1,0,b.jpg,b,2013,test\n2,7,1,12,c.jpg,c,2013,id_val\n"
    )
    (tmp_path / "categories.csv").write_text("y,category_id,name,count\n0,0,empty,3\n12,1,tayassu pecari,9\n")
    split = open_split(tmp_path)
    assert [split.classes[i] for i in split.labels] == ["tayassu pecari", "empty"]
    assert split.names == ("train/a.jpg", "train/b.jpg")
    assert split.group_names == ("location 7", "location 12")
    assert open_split(f"{tmp_path}#id_val").names == ("train/c.jpg",)


def test_camelyon17(tmp_path: Path) -> None:
    rows = [
        ("004", 4, 3, 5, 1, 0, 0),
        ("017", 1, 2, 9, 0, 0, 1),
        ("020", 4, 7, 7, 1, 2, 0),
        ("042", 3, 1, 1, 0, 2, 1),
    ]
    folder = "patches/patient_{0}_node_{1}/patch_patient_{0}_node_{1}_x_{2}_y_{3}.png"
    put(tmp_path, *(folder.format(*row) for row in rows))
    lines = (f"{i},{','.join(map(str, row))}\n" for i, row in enumerate(rows))
    (tmp_path / "metadata.csv").write_text(
        ",patient,node,x_coord,y_coord,tumor,center,split\n" + "".join(lines)
    )
    split = open_split(tmp_path)
    assert [split.classes[i] for i in split.labels] == ["tumor tissue", "normal tissue"]
    assert split.group_names == ("hospital 0", "hospital 2")
    assert len(open_split(f"{tmp_path}#id_val")) == 1
    assert len(open_split(tmp_path, role="train")) == 1


def test_a_metadata_csv_of_hugging_face(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a red door\n1.png,a lake\n")
    split = open_split(tmp_path)
    assert (split.captions, split.remarks) == (("a red door", "a lake"), ("read by its metadata.csv",))


# --- Parquet


def test_a_column_of_parts_in_one_parquet_file(tmp_path: Path) -> None:
    """As flickr30k is stored: every part in a file that is called test."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded(picture(i), "PNG"), "path": f"{i}.png"} for i in range(4)]
    columns = {"image": images, "caption": [["one", "two"]] * 4, "split": ["train", "test", "val", "test"]}
    pq.write_table(pa.table(columns), tmp_path / "test-00000-of-00001.parquet")
    split = open_split(tmp_path)
    assert (split.part, split.names) == ("test", ("1.png", "1.png (2)", "3.png", "3.png (2)"))
    assert split.read_bytes(2) == encoded(picture(3), "PNG")
    assert open_split(f"{tmp_path}#val").pictures == 1
