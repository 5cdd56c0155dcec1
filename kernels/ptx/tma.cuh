// Bulk copies between global and shared memory: boxes of a tensor, or bytes in a row (sm_90).
//
// Loads signal an mbarrier; stores form groups.  Both work in the asynchronous proxy: what threads
// wrote to shared memory must pass fence_proxy_async before a store reads it.
#pragma once

#include <core/device.cuh>

// What the driver's cuTensorMapEncodeTiled makes.
struct alignas(64) TensorMap {
  uint64 words[16];
};

// Load the box at `coordinates` (innermost first); elements outside of the tensor are zeros.
template <int32 rank>
DEVICE void tma_load(SharedAddress target, const TensorMap& map, const int32 (&coordinates)[rank],
                     SharedAddress barrier) {
  static_assert(2 <= rank && rank <= 5);
  const auto& c = coordinates;
  if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(c[0]), "r"(c[1])
        : "memory");
  } else if constexpr (rank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
  } else if constexpr (rank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
        : "memory");
  }
}

// Store the box at `coordinates`; elements outside of the tensor are left out.
template <int32 rank>
DEVICE void tma_store(const TensorMap& map, const int32 (&coordinates)[rank],
                      SharedAddress source) {
  static_assert(2 <= rank && rank <= 5);
  const auto& c = coordinates;
  if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(source), "r"(c[0]), "r"(c[1])
        : "memory");
  } else if constexpr (rank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            &map),
        "r"(source), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
  } else if constexpr (rank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            &map),
        "r"(source), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group "
        "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
        "r"(source), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
        : "memory");
  }
}

// Load `bytes` in one piece; addresses and size are multiples of 16.
DEVICE void bulk_load(SharedAddress target, const void* source, uint32 bytes,
                      SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

DEVICE void bulk_store(void* target, SharedAddress source, uint32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
               "r"(source), "r"(bytes)
               : "memory");
}

// Close this thread's current group of stores.
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until at most `pending` of this thread's groups are not yet written.
template <int32 pending>
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// Wait until at most `pending` groups still read shared memory.
template <int32 pending>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Show this thread's accesses to shared memory to bulk copies and wgmma.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
