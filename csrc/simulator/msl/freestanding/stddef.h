// What engine.h needs of the host's <stddef.h>; the shim is compiled without any system header.
#pragma once

typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
