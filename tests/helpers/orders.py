"""Whole batches and partitions of an order of samples, which a loader reads piece by piece."""

import numpy as np

from pipeline.data.order import Order


def global_batch(shard_sizes, *, seed, epoch, step, batch_size, partitions, window):
    """Sample numbers (int64 [batch_size]) of a global batch of an epoch."""
    order = Order(np.array(shard_sizes, np.int64), seed, batch_size, partitions, window)
    return order.samples(epoch, step, 0, batch_size)[0]


def partition_order(order, epoch, number):
    """Sample numbers of a full partition in the order they are served: int64 [~ N / P]."""
    low, high = order._bounds(number)
    return order._serve(epoch, number, 0, high - low).astype(np.int64)
