"""The shipped model is the one its card describes."""

import hashlib

SHA256 = "b461c4b0160c653f424886846fa022291e13864115149ed743bdd72bcce25fe9"


def test_the_reference_model_is_the_one_that_was_trained(tiny):
    assert hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest() == SHA256
