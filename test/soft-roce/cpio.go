package main

import (
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// Types of a node: the S_IF bits of its mode, which the format stores whatever system writes it.
const (
	typeFolder  = 0o040000
	typeFile    = 0o100000
	typeSymlink = 0o120000
	typeDevice  = 0o020000 // a character device
)

// A node is a file of an initramfs.
type node struct {
	mode         uint32 // type and permissions
	data         []byte // of a symlink, where it leads
	major, minor uint32 // of a device
}

// A tree is the content of an initramfs by name: no leading slash, folders above a name come by themselves.
type tree map[string]node

func (t tree) file(name string, perm uint32, data []byte) {
	t[name] = node{mode: typeFile | perm, data: data}
}
func (t tree) folder(name string)      { t[name] = node{mode: typeFolder | 0o755} }
func (t tree) symlink(name, to string) { t[name] = node{mode: typeSymlink | 0o777, data: []byte(to)} }
func (t tree) device(name string, perm uint32, major, minor uint32) {
	t[name] = node{mode: typeDevice | perm, major: major, minor: minor}
}

// writeTo writes the tree as a cpio archive of the "newc" format, which the kernel unpacks into its root file system. Order
// and times are fixed, so that equal trees give equal bytes. Archives may follow one another in one file.
func (t tree) writeTo(w io.Writer) error {
	all := make(tree, 2*len(t))
	for name, n := range t {
		all[name] = n
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, ok := t[dir]; !ok {
				all.folder(dir)
			}
		}
	}
	names := make([]string, 0, len(all))
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names) // folders before what is in them
	for i, name := range names {
		if err := writeNode(w, uint32(i+1), name, all[name]); err != nil {
			return err
		}
	}
	return writeNode(w, 0, "TRAILER!!!", node{})
}

func writeNode(w io.Writer, ino uint32, name string, n node) error {
	if uint64(len(n.data)) > 1<<32-1 {
		return fmt.Errorf("cpio: %s has %d bytes, and the format ends at 4 GiB", name, len(n.data))
	}
	fields := [13]uint32{
		ino, n.mode, 0, 0, // uid, gid
		1, 0, // links, time
		uint32(len(n.data)), 0, 0, // device that holds it
		n.major, n.minor,
		uint32(len(name) + 1), 0, // checksum: none
	}
	var h strings.Builder
	h.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(&h, "%08X", f)
	}
	h.WriteString(name)
	h.WriteByte(0)
	pad(&h, h.Len())
	if _, err := io.WriteString(w, h.String()); err != nil {
		return err
	}
	if _, err := w.Write(n.data); err != nil {
		return err
	}
	return pad(w, len(n.data))
}

// pad aligns what has n bytes to 4.
func pad(w io.Writer, n int) error {
	_, err := w.Write(make([]byte, -n&3))
	return err
}
