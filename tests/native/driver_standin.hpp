// The CUDA driver over the stand-in library.
#pragma once

#include <memory>
#include <string>

#include "driver/cuda.hpp"
#include "standin.h"

namespace elastickv::contract {

std::string standin_path();
// Opens the driver on the stand-in, whatever `options.library` says; fails the test if that fails.
std::shared_ptr<Driver> standin_driver(CudaOptions options);

}  // namespace elastickv::contract
