# join_source(LANGUAGE ROOT FOLDER...): joins ROOT and the headers of ours that it includes, each
# found in one of the folders by its file name, into one source, which the GPU's compiler gets
# on the user's machine: no such compiler to build, no headers to install. Writes it as
# LANGUAGE_source/LANGUAGE_source.h, for the extension (kMetalSource of `metal`), and as
# LANGUAGE_source/ROOT's name with .joined in it, to read and for the tests.

# Appends a file to `joined`, after what it includes; each file once.
macro(join file)
  if(NOT "${file}" IN_LIST joined_files)
    list(APPEND joined_files "${file}")
    file(STRINGS "${PROJECT_SOURCE_DIR}/${file}" includes REGEX "^#include \"")
    foreach(line ${includes})
      string(REGEX REPLACE ".*\"(.*)\".*" "\\1" name "${line}")
      cmake_path(GET name FILENAME name)
      foreach(folder ${join_folders})
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
    message(FATAL_ERROR "${file}: the GPU's compiler gets ASCII, but it has '${CMAKE_MATCH_0}'")
  endif()
  # Lines stay where they are, so that compiler errors name them truly.
  string(REGEX REPLACE "#pragma once|#include \"[^\"]*\"" "" text "${text}")
  string(APPEND joined "#line 1 \"${file}\"\n${text}")
endmacro()

function(join_source language root)
  set(joined)
  set(joined_files)
  set(join_folders ${ARGN})
  join("${root}")
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/${language}_source")
  cmake_path(GET root FILENAME file)
  string(REPLACE "." ".joined." file "${file}")
  file(CONFIGURE OUTPUT "${folder}/${file}" CONTENT "${joined}" @ONLY)
  string(SUBSTRING "${language}" 0 1 initial)
  string(TOUPPER "${initial}" initial)
  string(SUBSTRING "${language}" 1 -1 rest)
  file(CONFIGURE OUTPUT "${folder}/${language}_source.h" @ONLY CONTENT
"#pragma once
inline constexpr const char* k${initial}${rest}Source = R\"source(${joined})source\";
")
  set(${language}_source_dir "${folder}" PARENT_SCOPE)
endfunction()
