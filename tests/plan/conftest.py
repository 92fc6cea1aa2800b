from tests.training.tiny import tiny as tiny
