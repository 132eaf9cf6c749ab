// Package procmem reaches the memory of other processes, as a device would: by address, without their help. Linux only.
package procmem
