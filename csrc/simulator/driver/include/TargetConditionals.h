#pragma once

#define TARGET_OS_MAC 1
#define TARGET_OS_OSX 1
#define TARGET_OS_IPHONE 0
#define TARGET_OS_SIMULATOR 0
#define __MAC_OS_X_VERSION_MIN_REQUIRED 140000  // Apple's Availability.h has it, which everything includes there
