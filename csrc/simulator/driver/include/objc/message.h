#pragma once

#include "objc.h"

#ifdef __cplusplus
extern "C" {
#endif

// Cast to the method's own type before calling.
OBJC_EXPORT void objc_msgSend(void);
OBJC_EXPORT void objc_msgSend_stret(void);
OBJC_EXPORT void objc_msgSend_fpret(void);

#ifdef __cplusplus
}
#endif
