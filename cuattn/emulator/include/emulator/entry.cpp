// Compiled once for a kernel and a configuration: the kernel, unchanged, and one C function that
// calls it with the argument list of a CUDA launch.
//
//   -DEMULATED_FILE="<fmha_sm80.cu>" -DEMULATED_KERNEL=fmha_sm80
#include EMULATED_FILE

// Kernels take their parameters by value; `arguments` points at each of them in turn.
template <typename... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {
  struct Caller {
    Caller(void (*kernel)(Parameters...), Parameters*... values) { kernel(*values...); }
  };
  Caller{kernel, static_cast<Parameters*>(*arguments++)...};  // braces: from left to right
}

extern "C" void emulator_entry(void** arguments) { call(&EMULATED_KERNEL, arguments); }
