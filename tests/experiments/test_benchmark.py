"""The benchmark of a training step, where a peer is not installed."""

from importlib.util import find_spec

from torch import nn

from experiments import benchmark


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1000)

    def forward(self, image):
        return self.head(image.mean((2, 3)))


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None if name == "vit_pytorch" else find_spec(name))
    monkeypatch.setattr(benchmark.models, "create", lambda *_, **__: Small())
    monkeypatch.setattr(benchmark, "contenders", lambda family: ("ours", {}, {"timm": Small, "vit-pytorch": None}))
    benchmark.step("vit", "float32", 2, 2, False)
    out = capsys.readouterr().out
    assert "vit-pytorch is not installed and left out" in out and "vitlab / timm: " in out
