// griddepcontrol: a grid may start before the one it depends on has ended (sm_90).
//
// Both do nothing in a kernel that was not launched so.
#pragma once

#include <core/types.cuh>

// Wait until the grids this one depends on have ended and their writes can be seen.
DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the grid that depends on this one start, once all its blocks have said so or ended.
DEVICE void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;"); }
