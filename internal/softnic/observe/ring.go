package observe

import (
	"encoding/binary"
	"errors"
)

// A ring is memory that a NIC writes records to, and an observer reads them from: a page for the indices, then as many bytes as a
// power of two. A record lies in one piece: what is left before the end is filled, if it does not fit.
const (
	headerLen = 4096
	// MinRing and MaxRing bound the ring's length in bytes, without the header.
	MinRing = 1 << 17
	MaxRing = 1 << 30
)

// RingFile returns the length of the memory file for a ring of so many bytes, which are rounded up to a power of two.
func RingFile(size int) int {
	n := MinRing
	for n < size && n < MaxRing {
		n *= 2
	}
	return headerLen + n
}

// ringData returns the part of a ring's memory that records are in.
func ringData(mem []byte) ([]byte, error) {
	n := len(mem) - headerLen
	if n < MinRing || n > MaxRing || n&(n-1) != 0 {
		return nil, errors.New("observe: a ring of an impossible length")
	}
	return mem[headerLen:], nil
}

// A Producer is a NIC's side of a ring. It is for one goroutine at a time, waits for nobody, and does not allocate.
type Producer struct {
	h    *ringHeader
	data []byte
	head uint64 // of the record that is being written
	next uint64 // behind it
	tail uint64 // the observer's index when we last looked
	lost uint64
}

// NewProducer makes a Producer of a ring's memory, which the observer has made.
func NewProducer(mem []byte) (*Producer, error) {
	data, err := ringData(mem)
	if err != nil {
		return nil, err
	}
	return &Producer{h: headerOf(mem), data: data}, nil
}

// Begin returns room for n bytes of the record's Data; Commit, which is to follow, shows it to the observer. Without room the
// packet is lost, which is counted, and nil is returned. n is at most MaxData.
func (p *Producer) Begin(r *Record, n int) []byte {
	size := uint64(recordSize(n))
	mask := uint64(len(p.data) - 1)
	at, need := p.head, size
	if left := uint64(len(p.data)) - at&mask; left < size {
		need += left
	}
	if !p.fits(need) {
		p.lost++
		p.h.lost.Store(p.lost)
		return nil
	}
	if need != size {
		pad := p.data[at&mask:]
		pad[4] = recordPad // a record begins at a multiple of 8
		at += need - size
	}
	b := p.data[at&mask:][:size:size]
	r.put(b, n)
	p.next = at + size
	return b[RecordLen : RecordLen+n : RecordLen+n]
}

// fits reports whether there is room. An observer that says it has read what was not written gets nothing.
func (p *Producer) fits(need uint64) bool {
	if p.head-p.tail+need <= uint64(len(p.data)) {
		return true
	}
	tail := p.h.tail.Load()
	used := p.head - tail
	if used > uint64(len(p.data)) {
		return false
	}
	p.tail = tail
	return used+need <= uint64(len(p.data))
}

// Commit shows the record that Begin has begun.
func (p *Producer) Commit() {
	p.head = p.next
	p.h.head.Store(p.head) // release: the record is visible before the index; pairs with the load in Next
}

// A Consumer is an observer's side of a ring. It is for one goroutine at a time.
type Consumer struct {
	h    *ringHeader
	data []byte
	tail uint64
	head uint64 // the NIC's index when we last looked
	last bool   // it is not looked at again
	buf  []byte // a copy of the record: the NIC can write to the ring at any time
}

// NewConsumer makes a Consumer of a ring's memory.
func NewConsumer(mem []byte) (*Consumer, error) {
	data, err := ringData(mem)
	if err != nil {
		return nil, err
	}
	return &Consumer{h: headerOf(mem), data: data, buf: make([]byte, recordSize(MaxData))}, nil
}

// Lost returns how many packets there was no room for.
func (c *Consumer) Lost() uint64 { return c.h.lost.Load() }

// finish has nothing be read but what is there now: the NIC has ended, and whoever writes to its ring nevertheless has nothing to say.
func (c *Consumer) finish() {
	if !c.last {
		c.head, c.last = c.h.head.Load(), true
	}
}

// Next reads the next record, if there is one; it is valid until the next call. An error says that the NIC has written nonsense,
// and that nothing more can be read.
func (c *Consumer) Next(r *Record) (ok bool, err error) {
	mask := uint64(len(c.data) - 1)
	for {
		if c.head == c.tail && !c.last {
			c.head = c.h.head.Load() // acquire; pairs with the store in Commit
		}
		there := c.head - c.tail
		if there == 0 {
			return false, nil
		}
		if there > uint64(len(c.data)) || there&7 != 0 {
			return false, errRecord
		}
		b := c.data[c.tail&mask:]
		if b[4] == recordPad {
			if uint64(len(b)) > there || len(b) == len(c.data) { // there is room for a record at the start, or it would never end
				return false, errRecord
			}
			c.read(uint64(len(b)))
			continue
		}
		size := uint64(binary.LittleEndian.Uint32(b))
		if size < RecordLen || size&7 != 0 || size > there || size > uint64(len(b)) || size > uint64(len(c.buf)) {
			return false, errRecord
		}
		copy(c.buf, b[:size])
		if err := r.Decode(c.buf[:size]); err != nil {
			return false, err
		}
		c.read(size)
		return true, nil
	}
}

// read gives the NIC back the room of n bytes.
func (c *Consumer) read(n uint64) {
	c.tail += n
	c.h.tail.Store(c.tail)
}
