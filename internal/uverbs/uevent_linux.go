package uverbs

import (
	"bytes"
	"errors"
	"strings"
)

// A uevent is the kernel's message about a device, as far as it is wanted.
type uevent struct {
	action    string // "add", "remove"
	subsystem string // "infiniband_verbs"
	devname   string // of its node, below /dev: "infiniband/uverbs0"
}

var errUevent = errors.New("uverbs: not a message of the kernel about a device")

// parseUevent reads a message: "ACTION@DEVPATH", then variables "NAME=VALUE", each with a zero at its end. Of a variable
// that is there twice, the last counts; what has no "=" is left out. udev's messages begin with "libudev" and no "@".
func parseUevent(b []byte) (uevent, error) {
	head, rest, ok := bytes.Cut(b, []byte{0})
	if !ok || bytes.IndexByte(head, '@') < 1 {
		return uevent{}, errUevent
	}
	var e uevent
	for len(rest) > 0 {
		var v []byte
		v, rest, _ = bytes.Cut(rest, []byte{0})
		name, value, ok := strings.Cut(string(v), "=")
		if !ok {
			continue
		}
		switch name {
		case "ACTION":
			e.action = value
		case "SUBSYSTEM":
			e.subsystem = value
		case "DEVNAME":
			e.devname = value
		}
	}
	return e, nil
}
