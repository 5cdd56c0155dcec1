// Host twin of kernels/ptx/tma.cuh.
#pragma once

#include <core/device.cuh>

// What the host encodes: on a GPU the driver, here _tensor_map.py.
struct alignas(64) TensorMap {
  uint64 words[16];
};

template <int32 rank>
DEVICE void tma_load(SharedAddress target, const TensorMap& map, const int32 (&coordinates)[rank],
                     SharedAddress barrier) {
  emulator::tensor_load(target, &map, coordinates, rank, barrier);
}

template <int32 rank>
DEVICE void tma_store(const TensorMap& map, const int32 (&coordinates)[rank],
                      SharedAddress source) {
  emulator::tensor_store(&map, coordinates, rank, source);
}

DEVICE void bulk_load(SharedAddress target, const void* source, uint32 bytes,
                      SharedAddress barrier) {
  emulator::bulk_load(target, source, bytes, barrier);
}

DEVICE void bulk_store(void* target, SharedAddress source, uint32 bytes) {
  emulator::bulk_store(target, source, bytes);
}

DEVICE void bulk_commit() { emulator::bulk_commit(); }

template <int32 pending>
DEVICE void bulk_wait() {
  emulator::bulk_wait(pending);
}

template <int32 pending>
DEVICE void bulk_wait_read() {
  emulator::bulk_wait(pending);
}

DEVICE void fence_proxy_async() { emulator::fence_proxy_async(); }
