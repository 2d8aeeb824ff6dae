# Joins metal/sgd.metal and the headers it includes (csrc/math, metal/) into one
# source that Metal compiles at run time: no Metal compiler to build, none to
# install. Writes it as metal_source.h, for the extension, and as
# sgd.joined.metal, to read and for the tests.

# Appends a file to `joined`, after what it includes; each file once.
macro(join file)
  if(NOT "${file}" IN_LIST joined_files)
    list(APPEND joined_files "${file}")
    file(STRINGS "${PROJECT_SOURCE_DIR}/${file}" includes REGEX "^#include \"")
    foreach(line ${includes})
      string(REGEX REPLACE ".*\"(.*)\".*" "\\1" name "${line}")
      cmake_path(GET name FILENAME name)
      foreach(folder metal csrc/math)
        if(EXISTS "${PROJECT_SOURCE_DIR}/${folder}/${name}")
          join("${folder}/${name}")
          break() # the nested call has changed these variables
        endif()
      endforeach()
    endforeach()
    append_text("${file}")
  endif()
endmacro()

macro(append_text file)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
  file(READ "${PROJECT_SOURCE_DIR}/${file}" text)
  if(text MATCHES "[^\t\r\n -~]")
    message(FATAL_ERROR "${file}: MLX hands the source to Metal as ASCII, but it has '${CMAKE_MATCH_0}'")
  endif()
  # Lines stay where they are, so that compiler errors name them truly.
  string(REGEX REPLACE "#pragma once|#include \"[^\"]*\"" "" text "${text}")
  string(APPEND joined "#line 1 \"${file}\"\n${text}")
endmacro()

join(metal/sgd.metal)
set(metal_source_dir "${CMAKE_CURRENT_BINARY_DIR}/metal_source")
file(CONFIGURE OUTPUT "${metal_source_dir}/sgd.joined.metal" CONTENT "${joined}" @ONLY)
file(CONFIGURE OUTPUT "${metal_source_dir}/metal_source.h" @ONLY CONTENT
"#pragma once
inline constexpr const char* kMetalSource = R\"metal(${joined})metal\";
")
