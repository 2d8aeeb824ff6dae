// Stand-in for a cross-build: metal-cpp only names this type.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
