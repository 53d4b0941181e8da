"""The study of probability maps: one reduced run, and the measures that a wrong figure could hide in."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from studies import probability_maps as study

pytest.importorskip("sklearn")


def test_calibration_error():
    confidence = torch.tensor([0.6] * 10 + [0.9] * 10)
    right = torch.tensor([1.0] * 6 + [0.0] * 4 + [1.0] * 5 + [0.0] * 5)
    assert study.calibration_error(confidence, right, bins=2) == pytest.approx(0.5 * 0.0 + 0.5 * 0.4, abs=1e-6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert study.calibration_error(confidence[order], right[order], bins=2) == pytest.approx(0.2, abs=1e-6)
    assert study.calibration_error(confidence, right, bins=1) == pytest.approx(0.75 - 0.55, abs=1e-6)


def test_auroc():
    assert study.auroc(torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2])) == 1
    assert study.auroc(torch.tensor([0.5]), torch.tensor([0.5, 0.1])) == 0.75


def test_losses():
    p, classes = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]), torch.tensor([0, 1])
    found = {name: study.loss_of(name, p, classes).item() for name in study.LOSSES}
    own, u = np.array([0.7, 0.3]), 1 / 3
    q = p.double().numpy()
    m = (q + u) / 2
    divergence = 0.5 * np.mean((q * np.log(q / m) + u * np.log(u / m)).sum(1))
    expected = {"cross-entropy": -np.log(own).mean(), "Brier": np.mean([0.09 + 0.04 + 0.01, 0.01 + 0.49 + 0.36]),
                "focal": -((1 - own) ** 2 * np.log(own)).mean()}
    assert found == pytest.approx(expected | {"cross-entropy + JSD": expected["cross-entropy"] + 0.1 * divergence},
                                  rel=1e-5)


def test_fitted_temperature_is_the_best_one():
    model = study.Classifier(study.HONEST, "cross-entropy", 3e-3, 1, 2)
    images, classes = study.digits(1)["choice"]
    model.fit_temperature(images, classes)
    with torch.no_grad():
        def loss(t):
            return F.cross_entropy(model.network(images) * np.exp(-t), classes).item()

    fitted = model.log_temperature.item()
    assert abs(fitted) > 0.1 and loss(fitted) <= min(loss(fitted + 0.02), loss(fitted - 0.02), loss(0.0))
    torch.testing.assert_close(F.nll_loss(model(images).log(), classes).item(), loss(fitted), rtol=1e-4, atol=1e-6)


def test_parts_share_no_image_and_seeds_draw_anew():
    parts = study.digits(3)
    assert [len(images) for images, _ in parts.values()] == [1000, 297, 500] and parts["train"][0].abs().max() <= 1
    assert not torch.equal(parts["test"][1], study.digits(4)["test"][1])
    assert torch.equal(parts["test"][0], study.digits(3)["test"][0])


def test_reduced_run(tmp_path, monkeypatch, capsys):
    required = []
    monkeypatch.setattr(study, "require_tests", lambda *paths: required.append(paths))
    monkeypatch.setattr(study, "arms", lambda: [(study.HONEST, "cross-entropy"), (study.FITTED, "cross-entropy"),
                                                (study.LEARNED, "cross-entropy"), ("sparsemax", "Brier")])
    assert study.main(["--quick", "--output", str(tmp_path / "a.json")]) == 0
    results, printed = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert required == [tuple(study.TESTS)] and results["quick"] and len(results["confidence"]) == 4
    honest, fitted = results["confidence"][:2]
    assert honest["accuracy"] == fitted["accuracy"] and honest["nll"] != fitted["nll"]
    assert fitted["against_fitted"]["nll"] == dict(mean=0.0, low=0.0, high=0.0)
    assert "| sparsemax | Brier |" in printed and "in loss and calibration error: none" in printed


def test_faults(monkeypatch, capsys):
    monkeypatch.setattr(study, "require_tests", lambda *paths: None)
    assert study.main(["--seeds", "1"]) == 1 and "--seeds must be at least 2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert study.main(["--quick"]) == 1 and "pip install scikit-learn" in capsys.readouterr().err
