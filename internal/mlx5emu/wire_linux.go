package mlx5emu

import (
	"sync"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The wire: the ports of all devices of this process are connected by a switch. It learns which addresses are behind which port, and sends
// frames for those there, others to all. What a device sends its own rules see, too, as a card's own switch would have it.

// An inbox has the frames that have come in at a port, and that the device has not looked at. It is not the device's mu that guards it, as
// senders hold that of their own.
type inbox struct {
	mu     sync.Mutex
	frames []frame
	bytes  int
}

// maxInbox is how much may wait, in bytes. More is lost.
const maxInbox = 8 << 20

func (i *inbox) put(f frame) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.bytes+len(f.data) <= maxInbox {
		i.frames = append(i.frames, f)
		i.bytes += len(f.data)
	}
}

func (i *inbox) take() (list []frame) {
	i.mu.Lock()
	defer i.mu.Unlock()
	list, i.frames, i.bytes = i.frames, nil, 0
	return list
}

// ports is what the switch has learned.
var ports = struct {
	sync.Mutex
	of map[ib.MAC]*Device
}{of: map[ib.MAC]*Device{}}

// maxLearned is how many addresses the switch remembers. Then it begins anew.
const maxLearned = 1 << 12

// broadcast sends a frame of this device's. Called with mu held.
func (d *Device) broadcast(f frame) {
	d.inbox.put(f)
	f.from = nil
	if to := learn(d, &f); to != nil {
		if to != d {
			to.inbox.put(f)
		}
		return
	}
	eachDevice(d, func(o *Device) { o.inbox.put(f) })
}

// learn takes note of where a frame comes from, and returns where it goes; nil: everywhere.
func learn(d *Device, f *frame) *Device {
	ports.Lock()
	defer ports.Unlock()
	if src := f.source(); !src.IsMulticast() && ports.of[src] != d {
		if len(ports.of) >= maxLearned {
			clear(ports.of)
		}
		ports.of[src] = d
	}
	return ports.of[f.destination()]
}

// forgetPort is for a device that has gone.
func forgetPort(d *Device) {
	ports.Lock()
	defer ports.Unlock()
	for mac, o := range ports.of {
		if o == d {
			delete(ports.of, mac)
		}
	}
}

// receiveFrames steers what has come in, and reports whether there was anything. Called with mu held.
func (d *Device) receiveFrames() bool {
	list := d.inbox.take()
	for i := range list {
		d.steer(&list[i])
	}
	return len(list) > 0
}
