# SPDX-License-Identifier: Apache-2.0
"""Networks and shape tables against the published numbers."""

import pytest
import torch
import torch.nn.functional as F

from slimtorch.measure import count_macs, count_parameters
from slimtorch.models import ALEXNET, RESNET50, VGG16, LeNet5, LeNet300, mobilenet, resnet18


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(LeNet300, 266_610), (LeNet5, 431_080), (resnet18, 11_689_512), (mobilenet, 4_231_976)],
)
def test_published_parameter_counts(build, parameters):
    assert count_parameters(build())[0] == parameters


def test_published_macs():
    image = torch.randn(1, 3, 224, 224)
    assert count_macs(resnet18(), image)[0] == 1_814_073_344  # 1.8e9 in He et al., Table 1
    assert count_macs(mobilenet(), image)[0] == pytest.approx(569e6, rel=0.01)  # Howard et al., Table 8
    assert count_macs(LeNet300(), torch.randn(1, 1, 28, 28))[0] == 266_200


@pytest.mark.parametrize(
    ("table", "weights", "macs", "layers"),
    [(ALEXNET, 60_954_656, 724e6, 8), (VGG16, 138_344_128, 15.47e9, 16), (RESNET50, 25_502_912, 4.09e9, 54)],
)
def test_shape_tables(table, weights, macs, layers):
    assert sum(shape.count * shape.weights for shape in table) == weights  # without biases and batch-norm
    assert sum(shape.count * shape.macs for shape in table) == pytest.approx(macs, rel=2e-3)
    assert sum(shape.count for shape in table) == layers


@pytest.mark.parametrize("shape", [ALEXNET[0], ALEXNET[1], ALEXNET[7], RESNET50[3]], ids=lambda shape: shape.name)
def test_a_shape_describes_the_layer_it_builds(shape):
    layer = shape.build()
    assert tuple(layer.weight.shape) == shape.weight_shape
    output = layer(torch.zeros(shape.input_shape(2)))
    assert output.shape[1] == shape.c_out
    if not shape.is_linear:
        assert output.shape[-1] == shape.out_height


@pytest.mark.parametrize("build", [resnet18, mobilenet])
@pytest.mark.parametrize("size", [32, 57])
def test_other_input_sizes(build, size):
    assert build(classes=7)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_narrow_networks_run():
    assert LeNet300((6, 2))(torch.randn(3, 784)).shape == (3, 10)
    assert LeNet5((3, 7, 65))(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    assert mobilenet(width=0.25).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_lenet5_is_what_it_says():
    model, x = LeNet5(), torch.randn(2, 1, 28, 28)
    y = F.max_pool2d(F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias)), 2)
    y = F.max_pool2d(F.relu(F.conv2d(y, model.conv2.weight, model.conv2.bias)), 2).flatten(1)
    y = F.linear(F.relu(F.linear(y, model.fc1.weight, model.fc1.bias)), model.fc2.weight, model.fc2.bias)
    torch.testing.assert_close(model(x), y)
