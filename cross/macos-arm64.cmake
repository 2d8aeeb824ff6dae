# Builds for macOS on arm64, on Linux: Debian's clang and lld, and headers and stub
# libraries that tools/mac_sdk.py collects (MAC_SDK is their folder).
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_ARCHITECTURES arm64 CACHE STRING "")
set(CMAKE_OSX_DEPLOYMENT_TARGET 14.0 CACHE STRING "")
set(CMAKE_OSX_SYSROOT "$ENV{MAC_SDK}" CACHE PATH "")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)

set(llvm /usr/lib/llvm-19/bin)
set(CMAKE_CXX_COMPILER ${llvm}/clang++)
set(CMAKE_CXX_COMPILER_TARGET arm64-apple-macosx14.0)
set(CMAKE_C_COMPILER ${llvm}/clang)
set(CMAKE_C_COMPILER_TARGET arm64-apple-macosx14.0)
foreach(tool AR RANLIB INSTALL_NAME_TOOL OTOOL)
  string(TOLOWER ${tool} name)
  string(REPLACE "_" "-" name ${name})
  set(CMAKE_${tool} ${llvm}/llvm-${name} CACHE FILEPATH "")
endforeach()

# No sized deallocation, as Apple's clang has it: one operator delete to import.
set(CMAKE_CXX_FLAGS_INIT
  "-fno-sized-deallocation -nostdinc++ -isystem $ENV{MAC_SDK}/usr/include/c++/v1")
foreach(kind MODULE SHARED EXE)
  set(CMAKE_${kind}_LINKER_FLAGS_INIT "-fuse-ld=lld -Wl,-undefined,error")
endforeach()
