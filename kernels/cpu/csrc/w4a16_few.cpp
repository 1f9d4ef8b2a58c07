// Apart from kernels.cpp to be compiled beside it: this takes as long as the rest.
#include "w4a16_few.h"
