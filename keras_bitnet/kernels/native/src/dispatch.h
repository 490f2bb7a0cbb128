// Which instruction set runs.
#pragma once
#include "kernels.h"

namespace kbn {

// The table in use, or null where KERAS_BITNET_ISA names none that can run here.
const Kernels* current_kernels();

// Forces a table by name, or the best one by "auto". False where it cannot run here.
bool select_kernels(const char* name);

const char* available_isas();      // ','-separated, best first
const char* isa_of_environment();  // the value of KERAS_BITNET_ISA

}  // namespace kbn
