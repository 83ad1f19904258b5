#pragma once

#include "convert.hpp"

namespace elastickv::py {

void bind_block_objects(nb::module_ &module);

}  // namespace elastickv::py
