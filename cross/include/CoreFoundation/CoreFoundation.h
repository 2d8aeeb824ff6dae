// Stand-in for a cross-build: the three types that metal-cpp takes from Apple's
// header. A build on a Mac has the real one.
#pragma once

typedef double CFTimeInterval;
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
