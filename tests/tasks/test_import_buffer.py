import pytest
import torch

from hasten.datamodules import Digits
from hasten.errors import HastenError
from hasten.formats import Distilled, open_trajectories
from hasten.formats.pixels import PixelRange
from hasten.formats.released import write_buffer, write_released
from hasten.nn import ConvNet
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.tasks.import_buffer import import_buffer

HALF = PixelRange(torch.tensor(0.5), torch.tensor(0.5))


def model(width=4):
    return ConvNet(1, 8, 10, width=width, depth=2)


def buffers(folder):
    """Two files of two experts of three epochs, as the authors' program writes them."""
    made = []
    for number in (0, 10):
        experts = [[list(model().state_dict().values()) for _ in range(4)] for _ in range(2)]
        torch.save(experts, folder / f"replay_buffer_{number}.pt")
        made += experts
    return made


def run(folder, source, **changes):
    return import_buffer(folder, **({"source": source, "path": None, "model": model(), "data": Digits()} | changes))


def test_experts_of_the_authors_become_trajectories_and_back(tmp_path):
    original = buffers(tmp_path)
    metrics = run(tmp_path / "run", tmp_path)
    assert metrics == {"import/experts": 4, "import/epochs": 3}
    experts = open_trajectories(tmp_path / "run" / "experts")
    assert experts[0].recipe["imported"] == "replay_buffer"
    net = FlatModel(model()).filled(experts[3].at(2))
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), original[3][2], strict=True))
    write_buffer(tmp_path / "again.pt", experts)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(again[2][1], original[2][1], strict=True))


def test_one_file_goes_where_it_is_told(tmp_path):
    buffers(tmp_path)
    assert run(tmp_path, tmp_path / "replay_buffer_10.pt", path=tmp_path / "mine")["import/experts"] == 2
    assert len(open_trajectories(tmp_path / "mine")) == 2


def test_nothing_is_written_where_one_file_is_wrong(tmp_path):
    buffers(tmp_path)
    torch.save([[[torch.zeros(1)]]], tmp_path / "replay_buffer_7.pt")
    with pytest.raises(HastenError, match=r"replay_buffer_7.pt, expert 0, epoch 0, tensor 0 \(blocks.0.0.weight\)"):
        run(tmp_path, tmp_path)
    assert not (tmp_path / "experts").exists()


def test_experts_of_another_network_and_a_full_folder_are_refused(tmp_path):
    buffers(tmp_path)
    with pytest.raises(HastenError, match=r"expected \(5, 1, 3, 3\), got \(4, 1, 3, 3\); set the model's width"):
        run(tmp_path, tmp_path, model=model(width=5))
    run(tmp_path, tmp_path)
    with pytest.raises(HastenError, match="holds experts already; choose another folder or delete them"):
        run(tmp_path, tmp_path)


def test_a_released_set_becomes_an_artefact_in_the_range_of_the_data(tmp_path):
    labels = torch.arange(10)
    made = Distilled(torch.randn(10, 1, 8, 8), torch.randn(10, 10), labels, 0.25, HALF)
    write_released(tmp_path, made)
    assert run(tmp_path / "run", tmp_path) == {"import/images": 10}
    found = Distilled.read(tmp_path / "run" / "distilled")
    assert torch.equal(found.images, made.images)
    assert found.is_in_range(Digits().pixels)
    assert found.about["classes"] == [str(label) for label in range(10)]
    with pytest.raises(HastenError, match=r"expected images \(1, 9, 9\) as in data, got \(1, 8, 8\)"):
        run(tmp_path / "other", tmp_path, data=Digits(image_size=9))


def test_a_folder_of_neither_is_refused(tmp_path):
    with pytest.raises(HastenError, match=r"^import: source: expected replay_buffer_\*.pt, or images_\*.pt"):
        run(tmp_path, tmp_path)
